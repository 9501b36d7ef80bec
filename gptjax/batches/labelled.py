"""Labelled texts → batches of whole texts, each a pure function of its number.

Shape suffixes: B texts in a batch, T position, N labels.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.batches.permutation import draw_keys, permute
from gptjax.batches.rows import ALL, Rows, take_rows
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.text.labelled import Text
from gptjax.text.tokenizer import Tokenizer

POOL = 8  # batches that are sorted by length together
LENGTHS = (4, 2, 1)  # a batch has a quarter, half or all of max_tokens: few shapes, so that few programs compile


class TextBatch(NamedTuple):
    """Texts, padded at the end."""

    inputs: Any
    """int32 `[B, T]`; padding follows the text, so causal attention never attends to it."""
    lengths: Any
    """int32 `[B]`: tokens of each text."""
    targets: Any
    """int32 `[B]`, a label's number or -1; with several labels a text `[B, N]` of 0 and 1."""
    weights: Any
    """float32 `[B]`: weight of the text in the loss; 0 for padding rows."""


@dataclasses.dataclass(frozen=True)
class TextSet:
    """Encoded texts and their labels."""

    tokens: Sequence[np.ndarray]
    targets: np.ndarray
    """As in `TextBatch`, for all texts."""
    cut: np.ndarray
    """bool: texts that were longer than `max_tokens` and lost their end."""
    max_tokens: int

    def batch(self, numbers: np.ndarray, tokens: Sequence[np.ndarray], weights: np.ndarray) -> TextBatch:
        """Puts `tokens` of the texts `numbers` into one batch; number -1 gives a row without a text."""
        lengths = np.array([len(ids) for ids in tokens], np.int32)
        T = next(width for width in widths(self.max_tokens) if width >= lengths.max(initial=1))
        inputs = np.zeros((len(tokens), T), np.int32)
        for row, ids in zip(inputs, tokens, strict=True):
            row[: len(ids)] = ids
        here = numbers >= 0
        shape = (-1,) + (1,) * (self.targets.ndim - 1)
        targets = np.where(
            here.reshape(shape), self.targets[np.maximum(numbers, 0)], -1 if self.targets.ndim == 1 else 0
        )
        return TextBatch(inputs, lengths, targets.astype(np.int32), np.where(here, weights, 0).astype(np.float32))


def widths(max_tokens: int) -> list[int]:
    """The lengths that batches can have, ascending."""
    return sorted({-(-max_tokens // part) for part in LENGTHS})


def encode_texts(
    examples: Sequence[Text], tokenizer: Tokenizer, labels: Sequence[str], multi_label: bool, max_tokens: int
) -> TextSet:
    """Encodes texts like documents of pretraining: between two end-of-text tokens, if the tokenizer has one.

    Args:
        examples: Texts; their labels may be missing.
        tokenizer: The model's.
        labels: Names, in the order of the head's outputs.
        multi_label: Whether a text has any number of labels.
        max_tokens: Longer texts keep their beginning.

    Raises:
        UserError: There is no room for a token of a text.
    """
    number = {label: n for n, label in enumerate(labels)}
    ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    room = max_tokens - 2 * len(ends)
    if room < 1:
        raise UserError(
            f"task.max_tokens={max_tokens} must be at least {2 * len(ends) + 1}: a text's tokens stand between two"
            " end-of-text tokens"
        )
    encoded = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch([example.text for example in examples])]
    tokens = [np.concatenate([ends, ids[:room], ends]).astype(np.int32) for ids in encoded]
    if multi_label:
        targets = np.zeros((len(examples), len(labels)), np.int32)
        for row, example in zip(targets, examples, strict=True):
            row[[number[label] for label in example.labels]] = 1
    else:
        targets = np.array([number[e.labels[0]] if e.labels else -1 for e in examples], np.int32)
    return TextSet(tokens, targets, np.array([len(ids) > room for ids in encoded], bool), max_tokens)


@dataclasses.dataclass(frozen=True)
class TextBatches:
    """Endless batches of training texts; each epoch takes every text once, in a new order.

    Within `POOL` batches, texts are sorted by length to save padding, and the batches are shuffled. All of it follows
    from `(seed, step)`, so a resumed run gets the batches of an uninterrupted one.
    """

    texts: TextSet
    task: TaskConfig
    seed: int

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all texts."""
        return sum(len(ids) for ids in self.texts.tokens)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a text."""
        return self.tokens_per_epoch / len(self.texts.tokens)

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> TextBatch:
        """Returns rows of the batch of `step`, from 0. All rows are made, since the longest one sets the width."""
        draws, numbers = self._rows(step, batch_size)
        tokens = [
            self._augmented(self.texts.tokens[n], d) for d, n in zip(draws.tolist(), numbers.tolist(), strict=True)
        ]
        return take_rows(self.texts.batch(numbers, tokens, self._weights[numbers]), rows)

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the text of each row of the batch of `step`, twice: as the first and as the last."""
        return [(n, n) for n in self._rows(step, batch_size)[1].tolist()]

    def _rows(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The draw of each row, counted over all epochs, and its text."""
        pool, place = divmod(step, POOL)
        draws = np.arange(pool * POOL * batch_size, (pool + 1) * POOL * batch_size)
        numbers = self._texts_of(draws)
        lengths = np.array([len(self.texts.tokens[n]) for n in numbers])
        by_length = np.argsort(lengths, kind="stable").reshape(POOL, batch_size)
        chosen = by_length[np.random.default_rng((self.seed, pool)).permutation(POOL)[place]]
        return draws[chosen], numbers[chosen]

    def _texts_of(self, draws: np.ndarray) -> np.ndarray:
        """The text of each draw, counted over all epochs."""
        n = len(self.texts.tokens)
        epochs, places = np.divmod(draws, n)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = permute(places[here], n, draw_keys(self.seed, int(epoch))[1:])
        return numbers

    @functools.cached_property
    def _weights(self) -> np.ndarray:
        if self.task.class_weights == "none":
            return np.ones(len(self.texts.targets))
        counts = np.bincount(self.texts.targets)
        return (len(self.texts.targets) / len(counts) / counts)[self.texts.targets]

    def _augmented(self, ids: np.ndarray, draw: int) -> np.ndarray:
        """Deletes and swaps tokens between the first and the last one; follows from the seed and the draw."""
        if not (self.task.augment_delete or self.task.augment_swap):
            return ids
        random = np.random.default_rng((self.seed, 1, draw))
        inner = ids[1:-1].copy()
        for i in np.flatnonzero(random.random(max(0, len(inner) - 1)) < self.task.augment_swap):
            inner[[i, i + 1]] = inner[[i + 1, i]]
        inner = inner[random.random(len(inner)) >= self.task.augment_delete]
        return np.concatenate([ids[:1], inner, ids[max(1, len(ids) - 1) :]])


def ordered_batches(texts: TextSet, batch_size: int) -> Iterator[tuple[np.ndarray, TextBatch]]:
    """Yields every text once, shortest first, as `(numbers [B], batch)`; number -1 marks rows without a text."""
    order = np.argsort([len(ids) for ids in texts.tokens], kind="stable")
    order = np.concatenate([order, np.full(-len(order) % batch_size, -1)])
    nothing = np.empty(0, np.int32)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        tokens = [texts.tokens[n] if n >= 0 else nothing for n in numbers]
        yield numbers, texts.batch(numbers, tokens, np.ones(batch_size))
