"""A conversation with a model: stores the messages and streams answers."""

import dataclasses
import json
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np

from gptjax.checkpoints.run_dir import LoadedRun
from gptjax.config.verbs.decoding import DecodingConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.generation.decode import DecodingModel, prepare
from gptjax.generation.sample import TextCollector
from gptjax.generation.slots import Row, SlotDecoder
from gptjax.serving.chat_format import SYSTEM, AnswerFilter, ChatFormat, chat_format
from gptjax.text.chats import ASSISTANT, USER, Message
from gptjax.text.tokenizers.base import Tokenizer


class Conversation:
    """Messages in the run's chat template. A run without a template continues the text so far.

    If the context is too small for all messages, the oldest ones are left out, and `notify` is called.
    """

    def __init__(
        self, run: LoadedRun, options: DecodingConfig, system: str, notify: Callable[[str], None] = lambda message: None
    ):
        """See the class.

        Raises:
            UserError: The run has no tokenizer, or a system message has no effect because it has no template.
        """
        if run.tokenizer is None:
            raise UserError("the run has no tokenizer; import the model again with --tokenizer gpt2")
        self.format: ChatFormat | None = chat_format(run)
        if system and self.format is None:
            raise UserError("system has no effect: the run learned no chats and continues plain text; leave it out")
        self._options = sampling(options)
        self._tokenizer: Tokenizer = run.tokenizer
        self._model = for_texts(run, self._options, 1)
        self._decoder = SlotDecoder(self._model, 1)
        self._notify, self._told, self._turns = notify, False, 0
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
        row = Row(prompt, options, self._tokenizer.end_of_text, (self._turns, 0))
        self._turns += 1
        self._decoder.start(row)
        written = ""
        try:
            while self._decoder.rows and not collector.stopped:
                for event in self._decoder.step():
                    piece = strip(collector.add(event.piece))
                    written += piece
                    yield piece
            piece = strip(collector.end(), final=True)
            written += piece
            yield piece
        finally:
            self._decoder.stop(row)
            self.messages.append(Message(ASSISTANT, written))

    def save(self, path: Path) -> None:
        """Writes the messages as a row of JSONL, which `gptjax train` reads with task.kind=instruct."""
        messages = ([Message(SYSTEM, self.system)] if self.system else []) + self.messages
        row = {"messages": [message._asdict() for message in messages]}
        write_atomic(path, (json.dumps(row, ensure_ascii=False) + "\n").encode())

    def _prompt(self) -> tuple[np.ndarray, int]:
        """The token ids of the prompt, and the largest number of new tokens."""
        block_size = self._model.config.block_size
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
        return ids, min(self._options.max_new_tokens, block_size + 1 - len(ids))

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
    """Prepares the model of a run for decoding. It never chooses ids that the tokenizer does not have."""
    model, tokenizer = run.config.model, run.tokenizer
    kind, objective = run.config.task.kind, run.config.task.objective.kind
    if run.config.why_no_sample or model.encoder_layers or objective == "prefix":
        raise UserError(
            f"task.kind={kind}, task.objective.kind={objective}: chat and serve need a run that reads a"
            " prompt from left to right; use gptjax sample, or evaluate"
        )
    if tokenizer is not None and tokenizer.vocab_size < model.vocab_size:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    return prepare(model, run.params, options, rows)
