"""A conversation with a model: stores the messages and streams answers."""

import dataclasses
import json
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np

from gptjax.checkpoints.run_dir import LoadedRun
from gptjax.config.model import ModelConfig
from gptjax.config.verbs.decoding import DecodingConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.generation.decode import DecodingModel, Piece, prepare
from gptjax.generation.request import Request, check_prompts
from gptjax.generation.sample import TextCollector, without_unnamed_tokens
from gptjax.generation.slots import Row, SlotDecoder, fits
from gptjax.generation.speculative import shared_block_size, speculate
from gptjax.serving.chat_format import SYSTEM, AnswerFilter, ChatFormat, chat_format
from gptjax.text.chats import ASSISTANT, USER, Message
from gptjax.text.tokenizers.base import Tokenizer


class Conversation:
    """Messages in the run's chat template. A run without a template continues the text so far.

    If the context is too small for all messages, the oldest ones are left out, and `notify` is called.
    """

    def __init__(
        self,
        run: LoadedRun,
        options: DecodingConfig,
        system: str,
        notify: Callable[[str], None] = lambda message: None,
        draft: tuple[ModelConfig, dict] | None = None,
    ):
        """See the class; `draft` is that of `generation.sample.samples`.

        Raises:
            UserError: The run has no tokenizer, learned something else than to write text, an option names a token that
                it does not have, or a system message has no effect because it has no template.
        """
        if run.tokenizer is None:
            raise UserError("the run has no tokenizer; import the model again with --tokenizer gpt2")
        self.format: ChatFormat | None = chat_format(run)
        if system and self.format is None:
            raise UserError("system has no effect: the run learned no chats and continues plain text; leave it out")
        self._options = sampling(options)
        self._tokenizer: Tokenizer = run.tokenizer
        self._model = for_texts(run, self._options, 1)
        check_prompts(self._model.config, (), self._options)
        self._decoder = None if options.speculates else SlotDecoder(self._model, 1)
        self._draft: DecodingModel | None = None
        if draft is not None:
            self._draft = prepare(without_unnamed_tokens(draft[0], self._tokenizer), draft[1], self._options, 1)
        self._notify, self._told, self._turns = notify, False, 0
        self.accepted = ""
        """How many proposals of the draft were accepted in the last answer; empty without a draft."""
        self.messages: list[Message] = []
        self.system = system

    def reset(self) -> None:
        """Deletes all messages."""
        self.messages, self._told = [], False

    def answer(self, text: str) -> Generator[str]:
        """Yields the answer to a message of the user, in pieces as they are generated.

        If the caller stops early, the text so far is stored as the answer.

        Raises:
            UserError: The message alone does not fit in the context, or cannot be encoded.
        """
        self.messages.append(Message(USER, text))
        try:
            prompt, new = self._prompt()
        except UserError:
            self.messages.pop()
            raise
        stops = self._options.stop + (self.format.stops if self.format else ())
        options = dataclasses.replace(self._options, max_new_tokens=new, stop=stops)
        collector = TextCollector(self._tokenizer, options)
        strip = AnswerFilter(self.format).feed if self.format else _as_it_is
        number, written = self._turns, ""
        self._turns += 1
        decode = self._in_slot if self._decoder else self._speculate
        pieces = decode(prompt, options, number, lambda: collector.stopped)
        try:
            for new in pieces:
                piece = strip(collector.add(new))
                written += piece
                yield piece
            piece = strip(collector.end(), final=True)
            written += piece
            yield piece
        finally:
            pieces.close()
            self.messages.append(Message(ASSISTANT, written))

    def _in_slot(
        self, prompt: np.ndarray, options: SampleConfig, number: int, is_finished: Callable[[], bool]
    ) -> Generator[Piece]:
        """New tokens; the beginning that the prompt shares with the last one is not read again."""
        assert self._decoder is not None
        row = Row(prompt, options, self._tokenizer.end_of_text, (number, 0))
        self._decoder.start(row)
        try:
            while self._decoder.rows and not is_finished():
                yield from (event.piece for event in self._decoder.step())
        finally:
            self._decoder.stop(row)

    def _speculate(
        self, prompt: np.ndarray, options: SampleConfig, number: int, is_finished: Callable[[], bool]
    ) -> Generator[Piece]:
        """New tokens of which a draft proposes some; the whole prompt is read."""
        request = Request(
            *([prompt], options, self._tokenizer.end_of_text),
            numbers=[number],
            is_finished=lambda row: is_finished(),
            notify=self._set_accepted,
        )
        for [piece] in speculate(self._model, self._draft, request):
            yield piece

    def _set_accepted(self, line: str) -> None:
        self.accepted = line

    def save(self, path: Path) -> None:
        """Writes the messages as a row of JSONL, which `gptjax train` reads with task.kind=instruct."""
        messages = ([Message(SYSTEM, self.system)] if self.system else []) + self.messages
        row = {"messages": [message._asdict() for message in messages]}
        write_atomic(path, (json.dumps(row, ensure_ascii=False) + "\n").encode())

    def _prompt(self) -> tuple[np.ndarray, int]:
        """The token ids of the prompt, and the largest number of new tokens."""
        block_size = shared_block_size(self._model, self._draft)
        most = block_size - self._options.draft_tokens if self._options.speculates else block_size + 1
        room = max(block_size - self._options.max_new_tokens, block_size // 2, 1)
        if self.format is None:
            ids = self._tokenizer.encode("".join(message.content for message in self.messages))
            if self._tokenizer.end_of_text is not None:
                ids = np.concatenate([[self._tokenizer.end_of_text], ids]).astype(np.int32)
            if len(ids) > room:
                self._tell("the beginning of the text")
            ids = ids[-room:]
        else:
            system, first = [Message(SYSTEM, self.system)] if self.system else [], 0
            while len(ids := self.format.encode([*system, *self.messages[first:]])) > room:
                if first >= len(self.messages) - 1:
                    raise UserError(
                        f"the message has {len(ids):,} tokens with its template; at most {room:,} fit beside an answer"
                        f" in model.block_size={block_size}"
                    )
                first += 2
                self._tell("the first messages")
        slides = fits(self._model.config, len(ids), self._options.max_new_tokens) and not self._options.speculates
        return ids, self._options.max_new_tokens if slides else min(self._options.max_new_tokens, most - len(ids))

    def _tell(self, what: str) -> None:
        if not self._told:
            self._notify(f"the conversation no longer fits in model.block_size: the model does not see {what}")
            self._told = True


def _as_it_is(piece: str, final: bool = False) -> str:
    return piece


def sampling(options: DecodingConfig) -> SampleConfig:
    """Converts decoding options to `SampleConfig` with one sample."""
    shared = {field.name for field in dataclasses.fields(DecodingConfig)}
    return SampleConfig(**{name: getattr(options, name) for name in shared})


def for_texts(run: LoadedRun, options: SampleConfig, rows: int) -> DecodingModel:
    """Prepares the model of a run for decoding. It never chooses ids that the tokenizer does not have.

    Raises:
        UserError: It learned something else than to continue text from left to right.
    """
    config, model, tokenizer = run.config, run.config.model, run.tokenizer
    if not config.learned_text:
        raise UserError(
            f"task.kind={config.task.kind}: chat and serve need a run that learned to write text; use gptjax predict"
        )
    objective = config.task.objective.kind
    if config.why_no_sample or model.encoder_layers or objective == "prefix":
        raise UserError(
            f"task.kind={config.task.kind}, task.objective.kind={objective}: chat and serve need a run that reads a"
            f" prompt from left to right; use gptjax {'evaluate' if config.why_no_sample else 'sample'}"
        )
    if tokenizer is not None:
        model = without_unnamed_tokens(model, tokenizer)
    return prepare(model, run.params, options, rows)
