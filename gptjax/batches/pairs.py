"""Pairs of source and target → padded batches, each a pure function of its number.

Shape suffixes: B pairs in a batch, S position of the source, T position of the target.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.batches.labelled import widths
from gptjax.batches.permutation import shuffled
from gptjax.batches.rows import ALL, Rows, take_rows
from gptjax.errors import UserError
from gptjax.text.tokenizers.base import Tokenizer


class PairBatch(NamedTuple):
    """Sources for an encoder, targets for its decoder; both padded at their end."""

    inputs: Any
    """int32 `[B, T]`: end-of-text, then the target."""
    targets: Any
    """int32 `[B, T]`: the target, then end-of-text; -1: no loss."""
    source: Any
    """int32 `[B, S]`: the source, then end-of-text."""
    lengths: Any
    """int32 `[B]`: tokens of each source."""


class EncodedPair(NamedTuple):
    """Token ids of one pair; both sequences end with end-of-text."""

    source: np.ndarray
    target: np.ndarray


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[EncodedPair], int]:
    """Encodes pairs; texts longer than `max_tokens` (including end-of-text) are cut at the end.

    Returns:
        The pairs in their order, and how many of them were cut.

    Raises:
        UserError: The tokenizer has no end-of-text, which starts and ends a target.
    """
    end = tokenizer.end_of_text
    if end is None:
        raise UserError("task.kind=seq2seq needs a tokenizer with <|endoftext|>, which starts and ends a target")
    sides = [tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1)]
    cut = sum(max(len(source), len(target)) >= max_tokens for source, target in zip(*sides, strict=True))

    def ended(ids: np.ndarray) -> np.ndarray:
        return np.append(ids[: max_tokens - 1], end).astype(np.int32)

    return [EncodedPair(ended(source), ended(target)) for source, target in zip(*sides, strict=True)], cut


@dataclasses.dataclass(frozen=True)
class PairBatches:
    """Endless batches of pairs; each epoch uses every pair once, in a new order."""

    pairs: Sequence[EncodedPair]
    end_of_text: int
    max_tokens: int
    seed: int

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all pairs, sources and targets."""
        return sum(len(pair.source) + len(pair.target) for pair in self.pairs)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a pair."""
        return self.tokens_per_epoch / len(self.pairs)

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> PairBatch:
        """Returns `rows` of the batch of `step`, from 0. All rows are built, because the longest one sets the width."""
        return take_rows(self.pack(self._numbers(step, batch_size)), rows)

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the first and the last pair of each row of the batch of `step`: the same pair twice."""
        return [(n, n) for n in self._numbers(step, batch_size)]

    def ordered(self, batch_size: int) -> Iterator[PairBatch]:
        """Yields every pair once; the last batch may hold rows without targets."""
        for first in range(0, len(self.pairs), batch_size):
            numbers = list(range(first, min(first + batch_size, len(self.pairs))))
            yield self.pack(numbers + [-1] * (batch_size - len(numbers)))

    def pack(self, numbers: Sequence[int]) -> PairBatch:
        """Puts pairs, by number, into one batch; number -1 gives a row without a target."""
        chosen = [self.pairs[n] if n >= 0 else None for n in numbers]
        S, T = (
            next(w for w in widths(self.max_tokens) if w >= max(len(pair[side]) for pair in chosen if pair))
            for side in (0, 1)
        )
        source, lengths = np.zeros((len(chosen), S), np.int32), np.ones(len(chosen), np.int32)
        inputs, targets = np.zeros((len(chosen), T), np.int32), np.full((len(chosen), T), -1, np.int32)
        for row, pair in enumerate(chosen):
            if pair is not None:
                n = len(pair.target)
                source[row, : len(pair.source)], lengths[row] = pair.source, len(pair.source)
                inputs[row, :n], targets[row, :n] = np.append(self.end_of_text, pair.target[:-1]), pair.target
        return PairBatch(inputs, targets, source, lengths)

    def _numbers(self, step: int, batch_size: int) -> list[int]:
        """The pair of each row."""
        return shuffled(np.arange(step * batch_size, (step + 1) * batch_size), len(self.pairs), self.seed).tolist()
