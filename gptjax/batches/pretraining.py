"""Token stream → windows → batches, each a pure function of its number.

B is the batch size, T the window's length in tokens.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gptjax.batches.permutation import draw_keys, permute, shuffled
from gptjax.batches.ramps import Ramp, sum_before, value_at
from gptjax.batches.rows import ALL, Rows
from gptjax.errors import UserError
from gptjax.text.packing import Packing, pack_split
from gptjax.text.shards import TokenSplit


class Batch(NamedTuple):
    """Input of one forward pass: int32 arrays [B, T] (or [T] for one sequence), of NumPy or JAX."""

    inputs: Any
    targets: Any
    """`targets[t]` follows `inputs[t]`; -1: no loss."""
    segments: Any
    """Number of the document within the window, from 0. Attention stays inside a segment. None: one document."""
    positions: Any
    """Position within the segment, from 0."""


class PrefixBatch(NamedTuple):
    """A batch for a prefix LM: earlier tokens may attend to some later ones. The first four arrays are as in
    `Batch`.
    """

    inputs: Any
    targets: Any
    segments: Any
    positions: Any
    ahead: Any
    """bool `[B, T]`: True for tokens to which earlier ones of their segment may also attend."""


@dataclasses.dataclass(frozen=True)
class PackedWindows:
    """Windows of `block_size` tokens over a stream. Each epoch has different boundaries and a different order.

    Each epoch begins at a random offset and uses all its windows in a random order; both depend only on
    `(seed, epoch)`. So batch(step) is the same after any resume and for any number of devices.

    Raises:
        UserError: The stream is shorter than one window.
    """

    split: TokenSplit
    block_size: int
    seed: int
    attend_across_documents: bool
    skipped: frozenset[int] = frozenset()
    """Numbers (in the stream, from 0) of documents without loss."""
    ramp: Ramp = ()
    """Sequences of each step, in place of a fixed number; empty: none."""

    def __post_init__(self):
        if self.split.n_tokens < self.block_size + 1:
            raise UserError(
                f"the corpus has {self.split.n_tokens} tokens to train on, fewer than one window of"
                f" model.block_size={self.block_size} and its last target; the largest possible block_size is"
                f" {max(0, self.split.n_tokens - 1)}"
            )

    @property
    def windows_per_epoch(self) -> int:
        """Windows in one epoch. Other epochs use the tokens that are left over at both ends of the stream."""
        return max(1, (self.split.n_tokens - self.block_size) // self.block_size)

    @property
    def tokens_per_epoch(self) -> int:
        """Targets in one epoch."""
        return self.windows_per_epoch * self.block_size

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> Batch:
        """Returns rows of the batch of `step`, whose row r is window `step * batch_size + r`; with a ramp, the windows
        after those of the steps before.

        Args:
            step: From 0.
            batch_size: Rows of the global batch; a ramp has its own.
            rows: Rows to make; a process makes only its own.
        """
        return self.windows(self.numbers(step, batch_size)[rows])

    def numbers(self, step: int, batch_size: int) -> np.ndarray:
        """Returns the numbers of the windows of the batch of `step`, counted over all epochs."""
        first, size = step * batch_size, batch_size
        if self.ramp:
            first, size = sum_before(self.ramp, step), value_at(self.ramp, step)
        return np.arange(first, first + size)

    def windows(self, numbers: np.ndarray) -> Batch:
        """Returns the windows of these numbers, counted over all epochs, as arrays [B, T]."""
        starts = self.starts(numbers)
        batch = read_windows(self.split, starts, self.block_size, self.attend_across_documents)
        return self._without_skipped(batch, starts) if self.skipped else batch

    def _without_skipped(self, batch: Batch, starts: np.ndarray) -> Batch:
        """Removes targets whose inputs are in a skipped document; nothing else changes."""
        targets_BT, skipped = batch.targets.copy(), np.array(sorted(self.skipped))
        for b, start in enumerate(map(int, starts)):
            begins = self.split.document_starts(start, start + self.block_size) - start
            first = self.split.document_at(start)
            counted = np.bincount(begins[begins > 0], minlength=self.block_size)
            targets_BT[b, np.isin(first + np.cumsum(counted), skipped)] = -1
        return batch._replace(targets=targets_BT)

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the ranges of documents in each row of the batch of `step`, numbered in the stream from 0."""
        return [pair for n in self.numbers(step, batch_size) for pair in self.documents_of(int(n))]

    def documents_of(self, number: int) -> list[tuple[int, int]]:
        """Returns the first and the last document of each range of the stream that this window holds."""
        start = int(self.starts(np.array([number]))[0])
        return [(self.split.document_at(start), self.split.document_at(start + self.block_size - 1))]

    def row(self, index: int) -> Batch:
        """Returns window `index`, counted over all epochs, as arrays [T]."""
        batch = self.windows(np.array([index]))
        return Batch(*(None if array is None else array[0] for array in batch))

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """Positions in the stream at which windows begin."""
        epochs, numbers = np.divmod(numbers, self.windows_per_epoch)
        # Every offset leaves room for all windows and the last target of the last one.
        offsets = min(self.block_size, self.split.n_tokens - self.tokens_per_epoch)
        starts = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            keys = draw_keys(self.seed, int(epoch))
            windows = permute(numbers[epochs == epoch], self.windows_per_epoch, keys[1:])
            starts[epochs == epoch] = int(keys[0]) % offsets + windows * self.block_size
        return starts


@dataclasses.dataclass(frozen=True)
class BestFitWindows(PackedWindows):
    """Windows into which whole documents are packed, see `text.packing`; only longer ones than a window are cut.

    Every token is an input once in each epoch. The rest of a window is padding without targets. The packing follows
    from the stream and `block_size` alone, the order of windows from `(seed, epoch)`.
    """

    def __post_init__(self):
        if self.split.n_tokens < 2:
            raise UserError(f"the corpus has {self.split.n_tokens} tokens to train on, must have 2; give it more text")

    @functools.cached_property
    def packing(self) -> Packing:
        """The pieces of each window."""
        return pack_split(self.split, self.block_size)

    @property
    def windows_per_epoch(self) -> int:
        return self.packing.n_windows

    def windows(self, numbers: np.ndarray) -> Batch:
        B, T = len(numbers), self.block_size
        apart = self.split.n_documents > 1 and not self.attend_across_documents
        inputs_BT, targets_BT = np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
        segments_BT, positions_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
        for b, number in enumerate(shuffled(numbers, self.windows_per_epoch, self.seed).tolist()):
            at = 0
            for segment, (start, length) in enumerate(self._pieces(number)):
                stop, after = at + length, min(start + length + 1, self.split.n_tokens)
                tokens = self.split.slice(start, after)
                inputs_BT[b, at:stop] = tokens[:length]
                if self.split.document_at(start) not in self.skipped:
                    targets_BT[b, at : at + len(tokens) - 1] = tokens[1:]
                if self.split.end_of_text is None and len(self.split.document_starts(start + length, after)):
                    targets_BT[b, stop - 1] = -1  # the first token of another document
                segments_BT[b, at:] = segment
                positions_BT[b, at:stop] = np.arange(length)
                at = stop
            segments_BT[b, at:] += 1
        if not apart:
            positions_BT[:] = np.arange(T)
        return Batch(inputs_BT, targets_BT, segments_BT if apart else None, positions_BT)

    def documents_of(self, number: int) -> list[tuple[int, int]]:
        [window] = shuffled(np.array([number]), self.windows_per_epoch, self.seed).tolist()
        return [(document, document) for document in (self.split.document_at(at) for at, _ in self._pieces(window))]

    def _pieces(self, window: int) -> list[tuple[int, int]]:
        first, last = self.packing.first_W[window : window + 2]
        return list(
            zip(self.packing.start_P[first:last].tolist(), self.packing.length_P[first:last].tolist(), strict=True)
        )


MAKERS: dict[str, type[PackedWindows]] = {"stream": PackedWindows, "best_fit": BestFitWindows}
"""The windows of each `data.packing`."""


def read_windows(split: TokenSplit, starts: Iterable[int], block_size: int, attend_across_documents: bool) -> Batch:
    """Returns the windows that begin at `starts`, positions in the stream, as arrays [B, T].

    Past the end of the stream, inputs are 0 and targets -1. There are no segments if tokens may attend across documents
    or the stream is a single document.
    """
    apart = split.n_documents > 1 and not attend_across_documents
    starts = [int(start) for start in starts]
    B, T = len(starts), block_size
    tokens_BU = np.full((B, T + 1), -1, np.int32)  # U: the window and one target more
    begins_BU = np.zeros((B, T + 1), bool)
    for b, start in enumerate(starts):
        stop = min(start + T + 1, split.n_tokens)
        tokens_BU[b, : stop - start] = split.slice(start, stop)
        if apart:
            begins_BU[b, split.document_starts(start, stop) - start] = True
    targets_BT = tokens_BU[:, 1:].copy()
    if split.end_of_text is None:
        # Without end-of-text, the last token of a document would have to predict the first token of the next one.
        targets_BT[begins_BU[:, 1:]] = -1
    begins_BT = begins_BU[:, :-1]
    begins_BT[:, :1] = True
    t_T = np.arange(T, dtype=np.int32)
    return Batch(
        inputs=np.maximum(tokens_BU[:, :-1], 0),
        targets=targets_BT,
        segments=np.cumsum(begins_BT, axis=1, dtype=np.int32) - np.int32(1) if apart else None,
        positions=t_T - np.maximum.accumulate(np.where(begins_BT, t_T, np.int32(0)), axis=1),
    )


def cut_windows(batch: Batch, length: int) -> Batch:
    """Cuts windows `[B, T]` into pieces of `length` tokens, `[B T / length, length]`, each with positions from 0.

    The pieces have the targets of the windows, but a token attends only to those of its own piece.
    """
    inputs, targets, positions = (x.reshape(-1, length) for x in (batch.inputs, batch.targets, batch.positions))
    segments = None if batch.segments is None else batch.segments.reshape(-1, length)
    begins, t_T = positions == 0, np.arange(length, dtype=np.int32)
    begins[:, 0] = True
    positions = t_T - np.maximum.accumulate(np.where(begins, t_T, np.int32(0)), axis=1)
    return Batch(inputs, targets, segments, positions)


def evaluation_batches(
    split: TokenSplit, block_size: int, n_windows: int, batch_size: int, attend_across_documents: bool
) -> Iterator[Batch]:
    """Returns batches of fixed windows, evenly spaced over the stream; no token is a target twice.

    Every batch has `batch_size` rows. Rows that only fill the last batch, and positions past the end of the stream,
    have targets -1.

    Args:
        split: The stream.
        block_size: T.
        n_windows: Number of windows; 0, or more than there are: all, of which the last one may be partly filled.
        batch_size: B.
        attend_across_documents: As in training.

    Raises:
        UserError: The stream has fewer than two tokens.
    """
    if split.n_tokens < 2:
        raise UserError(f"the validation split has {split.n_tokens} tokens, must have at least 2; give it more text")
    total = -(-(split.n_tokens - 1) // block_size)
    chosen = min(n_windows or total, total)
    starts = [i * total // chosen * block_size for i in range(chosen)]
    # A window at the end of the stream has no targets.
    starts += [split.n_tokens] * (-chosen % batch_size)
    return (
        read_windows(split, starts[first : first + batch_size], block_size, attend_across_documents)
        for first in range(0, len(starts), batch_size)
    )
