"""Labelled texts → batches of whole texts, each a pure function of its number.

Shape suffixes: B texts in a batch, T position, N labels.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.batches.permutation import shuffled
from gptjax.batches.rows import ALL, Rows, take_rows
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.text.labelled import Text
from gptjax.text.tokenizers.base import Tokenizer

POOL = 8  # texts are sorted by length within this many batches
LENGTHS = (4, 2, 1)  # a batch has a quarter, half or all of max_tokens: few shapes, so that few programs compile


class TextBatch(NamedTuple):
    """Texts, padded at the end."""

    inputs: Any
    """int32 `[B, T]`; padding follows the text, so causal attention never attends to it."""
    lengths: Any
    """int32 `[B]`: tokens of each text."""
    targets: Any
    """int32 `[B]`, a label's number or -1; with several labels a text `[B, N]` of 0 and 1; of numbers float32 `[B, N]`,
    NaN where unknown.
    """
    weights: Any
    """float32 `[B]`: weight of the text in the loss; 0 for padding rows."""
    buckets: Any = None
    """int32 `[B, F]`: the n-grams of each text (`text.ngrams`); None: the head reads none."""
    counts: Any = None
    """float32 `[B, F]`: how often each n-gram occurs in the text; 0 for padding."""


class CandidateBatch(NamedTuple):
    """Several candidate sequences for each example, padded at the end."""

    inputs: Any
    """int32 `[B, K, T]`."""
    lengths: Any
    """int32 `[B, K]`: tokens of each sequence; 0: no such candidate."""
    targets: Any
    """Targets of `TextBatch`, or the number of the correct candidate."""
    weights: Any
    """float32 `[B]`: weight of the row in the loss; 0 for padding rows."""


@dataclasses.dataclass(frozen=True)
class Encoded(abc.ABC):
    """Encoded rows of one sequence each, and their targets."""

    tokens: Sequence[Any]
    """The token ids of each row."""
    targets: np.ndarray
    """The target of each row, as in the batch."""
    cut: np.ndarray
    """bool: rows whose text was cut at `max_tokens`."""
    max_tokens: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row's longest sequence."""
        return np.array([len(ids) for ids in self.tokens], np.int64)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum())

    @abc.abstractmethod
    def batch(self, numbers: np.ndarray, tokens: Sequence[Any], weights: np.ndarray) -> Any:
        """Puts `tokens` of the rows `numbers` into one batch; number -1 gives a row without text."""


@dataclasses.dataclass(frozen=True)
class TextSet(Encoded):
    """Encoded texts and their labels."""

    ngrams: Sequence[tuple[np.ndarray, np.ndarray]] = ()
    """The n-grams of each text and their counts (`text.ngrams`), if the head reads them."""

    def batch(self, numbers: np.ndarray, tokens: Sequence[np.ndarray], weights: np.ndarray) -> TextBatch:
        """See `Encoded`."""
        inputs, lengths = padded(tokens, self.max_tokens)
        return TextBatch(
            inputs, lengths, *taken(self.targets, numbers, weights), *self._taken_ngrams(numbers, inputs.shape[1])
        )

    def _taken_ngrams(self, numbers: np.ndarray, T: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The padded n-grams of the texts `numbers` and their counts, for a batch of `T` tokens."""
        if not self.ngrams:
            return None, None
        nothing = np.empty(0, np.int32), np.empty(0, np.float32)
        rows = [self.ngrams[n] if n >= 0 else nothing for n in numbers]
        most = max(len(buckets) for buckets, _ in rows)
        F = next(size for width, size in self._ngram_widths if width >= T and size >= most)
        buckets_BF, counts_BF = np.zeros((len(rows), F), np.int32), np.zeros((len(rows), F), np.float32)
        for row, (buckets, counts) in enumerate(rows):
            buckets_BF[row, : len(buckets)], counts_BF[row, : len(counts)] = buckets, counts
        return buckets_BF, counts_BF

    @functools.cached_property
    def _ngram_widths(self) -> list[tuple[int, int]]:
        """Each of the `widths`, and a power of two that is at least the n-grams of each text of so many tokens.

        So a width has one shape of batch, and most sets of texts have the same shapes.
        """
        sizes, lengths = np.array([len(buckets) for buckets, _ in self.ngrams]), self.lengths
        most = [int(sizes[lengths <= width].max(initial=1)) for width in widths(self.max_tokens)]
        return [(width, 1 << (n - 1).bit_length()) for width, n in zip(widths(self.max_tokens), most, strict=True)]


@dataclasses.dataclass(frozen=True)
class CandidateSet(Encoded):
    """Rows of several encoded sequences each, and their targets."""

    candidates: int
    """Largest number of sequences in a row."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longest sequence of each row."""
        return np.array([max(len(ids) for ids in row) for row in self.tokens], np.int64)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(ids) for row in self.tokens for ids in row)

    def batch(self, numbers: np.ndarray, tokens: Sequence[Sequence[np.ndarray]], weights: np.ndarray) -> CandidateBatch:
        """See `Encoded`."""
        nothing = np.empty(0, np.int32)
        flat = [ids for row in tokens for ids in (*row, *[nothing] * (self.candidates - len(row)))]
        inputs, lengths = padded(flat, self.max_tokens)
        shape = len(tokens), self.candidates
        return CandidateBatch(
            inputs.reshape(*shape, -1), lengths.reshape(shape), *taken(self.targets, numbers, weights)
        )


def padded(tokens: Sequence[np.ndarray], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads sequences to one of the `widths`; returns them and their lengths."""
    lengths = np.array([len(ids) for ids in tokens], np.int32)
    T = next(width for width in widths(max_tokens) if width >= lengths.max(initial=1))
    inputs = np.zeros((len(tokens), T), np.int32)
    for row, ids in zip(inputs, tokens, strict=True):
        row[: len(ids)] = ids
    return inputs, lengths


def taken(
    targets: np.ndarray, numbers: np.ndarray, weights: np.ndarray, empty: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights of the rows `numbers`; number -1 gives weight 0 and the target `empty`, by default -1 for a
    single number and 0 for several.
    """
    here = numbers >= 0
    nothing = empty if empty is not None else -1 if targets.ndim == 1 else 0
    found = np.where(here.reshape((-1,) + (1,) * (targets.ndim - 1)), targets[np.maximum(numbers, 0)], nothing)
    return found.astype(targets.dtype), np.where(here, weights, 0).astype(np.float32)


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
        multi_label: Whether a text can have any number of labels.
        max_tokens: Longer texts are cut at the end.

    Raises:
        UserError: `max_tokens` leaves no room for a token of a text.
    """
    tokens, cut = encode_rows([(example.text,) for example in examples], tokenizer, end_marks(tokenizer), max_tokens)
    return TextSet(tokens, label_targets(examples, labels, multi_label), cut, max_tokens)


def label_targets(examples: Sequence[Text], labels: Sequence[str], multi_label: bool) -> np.ndarray:
    """The targets of a `TextSet`; -1, or zeros with `multi_label`, for texts without a label."""
    number = {label: n for n, label in enumerate(labels)}
    if multi_label:
        targets = np.zeros((len(examples), len(labels)), np.int32)
        for row, example in zip(targets, examples, strict=True):
            row[[number[label] for label in example.labels]] = 1
        return targets
    return np.array([number[e.labels[0]] if e.labels else -1 for e in examples], np.int32)


class Marks(NamedTuple):
    """Token ids before, between and after the texts of a row; each is one id or none."""

    start: tuple[int, ...]
    delimiter: tuple[int, ...]
    extract: tuple[int, ...]


def end_marks(tokenizer: Tokenizer) -> Marks:
    """End-of-text in all three places, as between documents in pretraining; none if the tokenizer has no such token."""
    end = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    return Marks(end, end, end)


def encode_rows(
    rows: Sequence[tuple[str, ...]], tokenizer: Tokenizer, marks: Marks, max_tokens: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Encodes rows of one or two texts with marks around them.

    If a row is too long, its longer text is cut at the end, or both are, to half of the room each.

    Returns:
        Token ids of each row, int32, and whether it was cut.

    Raises:
        UserError: There is no room for a token of each text, or there is no token to separate two texts.
    """
    parts = max(map(len, rows), default=1)
    around = len(marks.start) + len(marks.extract) + (parts - 1) * len(marks.delimiter)
    if max_tokens - around < parts:
        what = "a text has an end-of-text token on each side" if parts == 1 else "so many hold a pair"
        raise UserError(f"task.max_tokens={max_tokens} must be at least {around + parts}: {what}")
    if parts > 1 and not marks.delimiter:
        raise UserError(
            "task.delimiters=end_of_text: the tokenizer has no end-of-text token to put between two texts; set"
            " task.delimiters=learned"
        )
    encoded = iter(tokenizer.encode_batch([text for row in rows for text in row]))
    tokens, cut = [], np.zeros(len(rows), bool)
    for number, row in enumerate(rows):
        texts = [np.asarray(next(encoded), np.int32) for _ in row]
        kept = _fitted([len(ids) for ids in texts], max_tokens - around)
        cut[number] = any(len(ids) > size for ids, size in zip(texts, kept, strict=True))
        pieces: list[Any] = [marks.start]
        for place, (ids, size) in enumerate(zip(texts, kept, strict=True)):
            pieces += [marks.delimiter, ids[:size]] if place else [ids[:size]]
        tokens.append(np.concatenate([*pieces, marks.extract]).astype(np.int32))
    return tokens, cut


def _fitted(sizes: Sequence[int], room: int) -> list[int]:
    """Number of tokens that are kept of one or two texts."""
    if len(sizes) == 1:
        return [min(sizes[0], room)]
    first, second = sizes
    if first + second <= room:
        return [first, second]
    second = min(second, max(room // 2, room - first))
    return [min(first, room - second), second]


@dataclasses.dataclass(frozen=True)
class TextBatches:
    """Endless batches of training rows; each epoch uses every row once, in a new order.

    Within `POOL` batches, texts are sorted by length to save padding, and the batches are shuffled. Everything depends
    only on `(seed, step)`, so a resumed run gets the same batches as an uninterrupted one.
    """

    texts: Encoded
    task: TaskConfig
    seed: int
    rewrite: Callable[[int, np.random.Generator], np.ndarray] | None = None
    """Returns augmented token ids of a text, given its number; None: no augmentation."""

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all texts."""
        return self.texts.n_tokens

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a text."""
        return self.tokens_per_epoch / len(self.texts.tokens)

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> Any:
        """Returns `rows` of the batch of `step`, from 0. All rows are built, because the longest one sets the width."""
        draws, numbers = self._rows(step, batch_size)
        tokens = [self._augmented(self._ids(n, d), d) for d, n in zip(draws.tolist(), numbers.tolist(), strict=True)]
        return take_rows(self.texts.batch(numbers, tokens, self._weights[numbers]), rows)

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the first and the last text of each row of the batch of `step`: the same text twice."""
        return [(n, n) for n in self._rows(step, batch_size)[1].tolist()]

    def _rows(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """The draw number of each row, counted over all epochs, and its text."""
        pool, place = divmod(step, POOL)
        draws = np.arange(pool * POOL * batch_size, (pool + 1) * POOL * batch_size)
        numbers = shuffled(draws, len(self.texts.tokens), self.seed)
        by_length = np.argsort(self._lengths[numbers], kind="stable").reshape(POOL, batch_size)
        chosen = by_length[np.random.default_rng((self.seed, pool)).permutation(POOL)[place]]
        return draws[chosen], numbers[chosen]

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return self.texts.lengths

    @functools.cached_property
    def _weights(self) -> np.ndarray:
        if self.task.class_weights == "none":
            return np.ones(len(self.texts.targets))
        counts = np.bincount(self.texts.targets)
        return (len(self.texts.targets) / len(counts) / counts)[self.texts.targets]

    def _ids(self, number: int, draw: int) -> Any:
        if self.rewrite is None:
            return self.texts.tokens[number]
        return self.rewrite(number, np.random.default_rng((self.seed, 3, draw)))

    def _augmented(self, ids: np.ndarray, draw: int) -> np.ndarray:
        """Randomly deletes and swaps tokens, except the first and the last one; depends on the seed and the draw."""
        if not (self.task.augment_delete or self.task.augment_swap):
            return ids
        random = np.random.default_rng((self.seed, 1, draw))
        inner = ids[1:-1].copy()
        for i in np.flatnonzero(random.random(max(0, len(inner) - 1)) < self.task.augment_swap):
            inner[[i, i + 1]] = inner[[i + 1, i]]
        inner = inner[random.random(len(inner)) >= self.task.augment_delete]
        return np.concatenate([ids[:1], inner, ids[max(1, len(ids) - 1) :]])


def ordered_batches(texts: Encoded, batch_size: int) -> Iterator[tuple[np.ndarray, Any]]:
    """Yields every row once, shortest first, as `(numbers [B], batch)`; number -1 marks rows without a text."""
    order = np.argsort(texts.lengths, kind="stable")
    order = np.concatenate([order, np.full(-len(order) % batch_size, -1)])
    nothing = np.empty(0, np.int32)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        tokens = [texts.tokens[n] if n >= 0 else nothing for n in numbers]
        yield numbers, texts.batch(numbers, tokens, np.ones(batch_size))
