"""Generates text from text prompts, for the command line and the trainer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.beam import beam_search
from gptjax.generation.constraint import make_constraints
from gptjax.generation.contrastive import contrastive_search
from gptjax.generation.decode import BUFFER, Logprobs, Piece, prepare, stream
from gptjax.generation.request import Request
from gptjax.generation.speculative import speculate
from gptjax.generation.stream import StopFilter, make_text_stream
from gptjax.text.tokenizers.base import Tokenizer

STREAM_LENGTH = 8  # tokens in one streamed piece of text


class Sample(NamedTuple):
    """One continuation of a prompt."""

    text: str
    """The text without the prompt, cut before a stop string."""
    finish: Literal["stop", "length"]
    """Why it ended: stop (end-of-text or a stop string) or length (`max_new_tokens`)."""
    tokens: list[int]
    """Number of tokens that begin in the text."""
    logprobs: Logprobs | None
    """Log-probabilities of these tokens, if `options.logprobs` is set."""


def sample_texts(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: SampleConfig,
    **others: Any,
) -> list[list[str]]:
    """Returns the text of every `Sample`. Arguments and errors are those of `samples`."""
    found = samples(config, params, tokenizer, prompts, options, **others)
    return [[sample.text for sample in row] for row in found]


def samples(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: SampleConfig,
    *,
    at_start: bool = False,
    prefix: bool = False,
    numbers: Sequence[int] | None = None,
    draft: tuple[ModelConfig, dict] | None = None,
    on_text: Callable[[int, int, str], None] | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> list[list[Sample]]:
    """Returns the continuations of every prompt, `[prompt][sample]`.

    Args:
        config: Shape of the model.
        params: As `init_params` returns them.
        tokenizer: The one that the model was trained with.
        prompts: Texts, none empty. The tokenizer's end token in them is plain text unless `options.allow_special`.
        options: Number and length of samples, choice of tokens, precision. `prompt` and `run_dir` are not used here.
        at_start: Whether each prompt begins a document; end-of-text is then put before it, as in training.
        prefix: Whether the tokens of a prompt also attend to later ones, as in a prefix LM.
        numbers: Numbers of the prompts, which select their random keys; None: 0, 1, 2 ...
        draft: Config and params of the model of `options.draft_run_dir`, which has the same tokenizer.
        on_text: Called with prompt number, sample number (both from 0) and the next piece of text, as soon as it is
            certain. A piece has only whole characters; joined, the pieces are the returned text.
        notify: Receives one line about a prompt that is cut or a context that slides.

    Raises:
        UserError: A prompt is empty or cannot be encoded, or an option names a token outside the vocabulary.
    """
    ids = encode_prompts(tokenizer, prompts, options.allow_special)
    if at_start and tokenizer.end_of_text is not None:
        ids = [np.concatenate([[tokenizer.end_of_text], tokens]) for tokens in ids]
    config = without_unnamed_tokens(config, tokenizer)
    rows = [TextCollector(tokenizer, options) for _ in range(len(prompts) * options.num_samples)]
    request = Request(
        *(ids, options, tokenizer.end_of_text, bad_word_ids(tokenizer, options.bad_words)),
        constraints=make_constraints(tokenizer, options, len(rows)),
        numbers=numbers,
        is_finished=lambda row: rows[row].stopped,
        notify=notify,
    )
    if options.num_beams > 1:
        found = beam_search(config, params, request, prefix=prefix)
        return [[_whole(tokenizer, tokens, options) for tokens in row] for row in found]
    piece_length = STREAM_LENGTH if on_text or options.stop else BUFFER

    def take(row: int, text: str) -> None:
        if text and on_text:
            on_text(*divmod(row, options.num_samples), text)

    if options.contrastive_alpha:
        found = contrastive_search(config, params, request, prefix=prefix)
    elif options.speculates:
        if prefix:
            raise UserError("task.objective.kind=prefix: a draft needs a run that reads a prompt from left to right")
        model = prepare(config, params, options, len(rows))
        drafter = None
        if draft is not None:
            drafter = prepare(without_unnamed_tokens(draft[0], tokenizer), draft[1], options, len(rows))
        found = speculate(model, drafter, request)
    else:
        found = stream(config, params, request, piece_length=piece_length, prefix=prefix)
    for pieces in found:
        for row, piece in enumerate(pieces):
            take(row, rows[row].add(piece))
    for number, row in enumerate(rows):
        take(number, row.end())
    ended = [row.sample() for row in rows]
    return [ended[i : i + options.num_samples] for i in range(0, len(ended), options.num_samples)]


def without_unnamed_tokens(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model without ids that its tokenizer lacks: they have no text, so they are never chosen."""
    return dataclasses.replace(config, vocab_size=min(config.vocab_size, tokenizer.vocab_size))


def _whole(tokenizer: Tokenizer, tokens: np.ndarray, options: SampleConfig) -> Sample:
    """The sample of tokens that were generated in one piece."""
    collector = TextCollector(tokenizer, options)
    collector.add(Piece(tokens, None))
    collector.end()
    return collector.sample()


class TextCollector:
    """Collects the pieces of one sample, and returns text as soon as it is certain."""

    def __init__(self, tokenizer: Tokenizer, options: SampleConfig):
        self._tokenizer, self._options = tokenizer, options
        self._decode, self._filter = make_text_stream(), StopFilter(options.stop)
        self._pieces: list[Piece] = []
        self._text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._filter.found

    def add(self, piece: Piece) -> str:
        """Adds new tokens; returns the new text that is certain."""
        if not self.stopped:
            self._pieces.append(piece)
        return self._take(self._filter.feed(self._decode(self._tokenizer.decode_bytes(piece.tokens_N), False)))

    def end(self) -> str:
        """Returns the text that was held back."""
        return self._take(self._filter.feed(self._decode(b"", True), final=True))

    def sample(self) -> Sample:
        """The collected sample."""
        tokens = np.concatenate([np.zeros(0, np.int32), *(piece.tokens_N for piece in self._pieces)])
        ended = self.stopped or len(tokens) < self._options.max_new_tokens
        if self.stopped:
            tokens = tokens[: tokens_of(self._tokenizer, tokens, len(self._text))]
        parts = [piece.logprobs for piece in self._pieces if piece.logprobs is not None]
        logprobs = (
            Logprobs(*(np.concatenate(part)[: len(tokens)] for part in zip(*parts, strict=True))) if parts else None
        )
        return Sample(self._text, "stop" if ended else "length", tokens.tolist(), logprobs)

    def _take(self, text: str) -> str:
        self._text += text
        return text


def tokens_of(tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray, characters: int) -> int:
    """Number of tokens that begin within the first `characters` characters of their text."""
    decode, begin = make_text_stream(), 0
    for number, token in enumerate(tokens):
        if begin >= characters:
            return number
        begin += len(decode(tokenizer.decode_bytes([token]), False))
    return len(tokens)


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The token sequences of texts, alone and after a space. Texts that the tokenizer cannot encode are ignored.

    A sequence that ends with another one is redundant and not returned.
    """
    found: set[tuple[int, ...]] = set()
    for word in words:
        for text in (word, f" {word}"):
            try:
                found.add(tuple(tokenizer.encode(text).tolist()))
            except UserError:  # characters that the tokenizer does not have
                continue
    return sorted(list(word) for word in found if not any(word[-len(w) :] == w for w in found if len(w) < len(word)))


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], allow_special: bool) -> list[np.ndarray]:
    """Returns the token ids of prompts. With `allow_special`, the end token in a text is encoded as that token.

    Raises:
        UserError: A prompt is empty or cannot be encoded.
    """
    return [_encode(tokenizer, text, allow_special, number) for number, text in enumerate(prompts, 1)]


def _encode(tokenizer: Tokenizer, text: str, allow_special: bool, number: int) -> np.ndarray:
    if not text:
        raise UserError(f"prompt {number} is empty; give at least one character")
    end = tokenizer.end_token
    if not allow_special or end not in text:
        return tokenizer.encode(text)
    if tokenizer.end_of_text is None:
        raise UserError(f"prompt {number} contains {end}, but this model's tokenizer has no such token")
    first, *others = (tokenizer.encode(part) for part in text.split(end))
    return np.concatenate([first, *(np.concatenate([[tokenizer.end_of_text], part]) for part in others)])
