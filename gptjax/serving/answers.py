"""Answers to completion and chat requests: the sequences to decode, and the response objects."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.generation.constraint import Form
from gptjax.generation.slots import Row
from gptjax.generation.stream import make_text_stream
from gptjax.serving import objects
from gptjax.serving.chat_format import AnswerFilter, ChatFormat
from gptjax.serving.engine import Token, Update, pairs
from gptjax.serving.protocol import Asked
from gptjax.text.tokenizers.base import Tokenizer

CHUNK = "chat.completion.chunk"


@dataclasses.dataclass
class _Choice:
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    prompt_tokens: list[Token] = dataclasses.field(default_factory=list)
    finish: str | None = None
    begun: bool = False


class Answer(abc.ABC):
    """The answer to a request: the sequences to decode, and the response objects."""

    before = ""
    """The text that the model generates before a text of the required form."""

    def __init__(self, asked: Asked, prompts: Sequence[np.ndarray], tokenizer: Tokenizer, model: str, id: str):
        self._asked, self.prompts, self._tokenizer, self._model, self._id = asked, prompts, tokenizer, model, id
        self._choices = [_Choice() for _ in range(len(prompts) * asked.samples)]

    @property
    def stream(self) -> bool:
        """Whether the response is streamed."""
        return self._asked.stream

    @property
    def form(self) -> Form | None:
        """The required form of each text; None: any text."""
        return self._asked.form

    @abc.abstractmethod
    def rows(self) -> list[Row]:
        """The sequences to decode; other methods name them by their index in this list."""

    @abc.abstractmethod
    def take(self, index: int, update: Update) -> str:
        """Adds new tokens of a sequence; returns its new text."""

    @abc.abstractmethod
    def whole(self) -> dict[str, Any]:
        """The complete response, after all sequences have ended."""

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first events of a stream."""
        return iter(())

    @abc.abstractmethod
    def chunks(self, index: int, update: Update) -> Iterator[dict[str, Any]]:
        """The events for new tokens of a sequence."""

    def end(self) -> Iterator[dict[str, Any]]:
        """The last events of a stream."""
        if self._asked.include_usage:
            yield self._event([]) | {"usage": self._usage()}

    @abc.abstractmethod
    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream."""

    def _usage(self) -> dict[str, int]:
        return objects.usage(sum(map(len, self.prompts)), sum(len(choice.tokens) for choice in self._choices))

    def _add(self, index: int, update: Update, text: str) -> str:
        choice = self._choices[index]
        choice.text += text
        choice.tokens += update.tokens
        choice.finish = update.finish or choice.finish
        return text


class CompletionAnswer(Answer):
    """Continuations of prompts, ordered by prompt, then by sample."""

    def __init__(self, asked: Asked, prompts: Sequence[np.ndarray], tokenizer: Tokenizer, model: str):
        super().__init__(asked, prompts, tokenizer, model, objects.new_id("cmpl"))
        self._texts = [tokenizer.decode(prompt) if asked.echo else "" for prompt in prompts]
        if asked.echo and asked.logprobs is not None:
            for number, choice in enumerate(self._choices):
                choice.prompt_tokens = self._tokens_of_prompt(prompts[number // asked.samples])

    def rows(self) -> list[Row]:
        asked = self._asked
        score = asked.echo and asked.logprobs is not None
        return [
            Row(prompt, asked.options, self._tokenizer.end_of_text, (number, sample), score, asked.score_only)
            for number, prompt in enumerate(self.prompts)
            for sample in range(asked.samples)
        ]

    def take(self, index: int, update: Update) -> str:
        choice = self._choices[index]
        if update.prompt_logprobs is not None:
            chosen_N, ids_NK, top_NK = update.prompt_logprobs
            first = next(n for n, token in enumerate(choice.prompt_tokens) if n and token.logprob is None)
            for n, (logprob, ids_K, top_K) in enumerate(zip(chosen_N, ids_NK, top_NK, strict=True), first):
                top = pairs(ids_K, top_K)
                choice.prompt_tokens[n] = choice.prompt_tokens[n]._replace(logprob=float(logprob), top=top)
        return self._add(index, update, update.text)

    def whole(self) -> dict[str, Any]:
        asked, choices = self._asked, []
        for index, choice in enumerate(self._choices):
            before = self._texts[index // asked.samples]
            tokens = [*choice.prompt_tokens, *_moved(choice.tokens, len(before))]
            choices.append(self._choice(index, before + choice.text, tokens, choice.finish))
        return self._event(choices) | {"usage": self._usage()}

    def chunks(self, index: int, update: Update) -> Iterator[dict[str, Any]]:
        choice = self._choices[index]
        self.take(index, update)
        missing = choice.prompt_tokens and any(token.logprob is None for token in choice.prompt_tokens[1:])
        if missing and update.finish is None:
            return
        before = self._texts[index // self._asked.samples]
        text, tokens = update.text, _moved(update.tokens, len(before))
        if not choice.begun:
            choice.begun = True
            text, tokens = before + text, [*choice.prompt_tokens, *tokens]
        if text or tokens or update.finish is not None:
            yield self._event([self._choice(index, text, tokens, update.finish)])

    def _tokens_of_prompt(self, prompt: np.ndarray) -> list[Token]:
        decode, begin, tokens = make_text_stream(), 0, []
        for token in prompt.tolist():
            tokens.append(Token(token, begin, None, ()))
            begin += len(decode(self._tokenizer.decode_bytes([token]), False))
        return tokens

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        count = self._asked.logprobs
        logprobs = None if count is None else objects.completion_logprobs(self._tokenizer, tokens, count)
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return objects.envelope(self._id, "text_completion", self._model) | {"choices": choices}


class ChatAnswer(Answer):
    """The answers to a chat."""

    def __init__(
        self,
        asked: Asked,
        prompt: np.ndarray,
        tokenizer: Tokenizer,
        model: str,
        format: ChatFormat,
        most_new: int | None,
    ):
        """`most_new` is the number of tokens that fit after the prompt; None if the request sets a limit."""
        options = asked.options
        if most_new is not None:
            options = dataclasses.replace(options, max_new_tokens=max(1, min(options.max_new_tokens, most_new)))
        options = dataclasses.replace(options, stop=(*options.stop, *format.stops))
        asked = dataclasses.replace(asked, options=options)
        super().__init__(asked, [prompt], tokenizer, model, objects.new_id("chatcmpl"))
        self.before = format.header_end
        self._filters = [AnswerFilter(format) for _ in range(asked.samples)]

    def rows(self) -> list[Row]:
        asked, end = self._asked, self._tokenizer.end_of_text
        return [Row(self.prompts[0], asked.options, end, (0, sample)) for sample in range(asked.samples)]

    def take(self, index: int, update: Update) -> str:
        return self._add(index, update, self._filters[index].feed(update.text, final=update.finish is not None))

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": self._logprobs(choice.tokens),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self._choices)
        ]
        envelope = objects.envelope(self._id, "chat.completion", self._model)
        return envelope | {"choices": choices, "usage": self._usage()}

    def begin(self) -> Iterator[dict[str, Any]]:
        for index in range(self._asked.samples):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunks(self, index: int, update: Update) -> Iterator[dict[str, Any]]:
        text = self.take(index, update)
        if text or update.tokens:
            yield self._chunk(index, {"content": text}, self._logprobs(update.tokens), None)
        if update.finish is not None:
            yield self._chunk(index, {}, None, update.finish)

    def _chunk(self, index: int, delta: dict, logprobs: dict | None, finish: str | None) -> dict[str, Any]:
        return self._event([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return objects.envelope(self._id, CHUNK, self._model) | {"choices": choices}

    def _logprobs(self, tokens: Sequence[Token]) -> dict | None:
        if self._asked.logprobs is None:
            return None
        return objects.chat_logprobs(self._tokenizer, tokens, self._asked.logprobs)


def _moved(tokens: Sequence[Token], characters: int) -> list[Token]:
    """Shifts the character offsets of tokens."""
    return [token._replace(begin=token.begin + characters) for token in tokens]
