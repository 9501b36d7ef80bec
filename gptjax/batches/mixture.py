"""Batches from several sources in exact proportions, each a pure function of the step.

B is the batch size, T the window's length in tokens, K the number of sources, M the length of a cycle.

Sequences are numbered over the whole run: sequence r of step s has the number s * B + r. The order of sources is a
cycle of M numbers. In its first n numbers, for every n, each source occurs n * share times, with an error below one.
So any range of steps has the requested proportions, with an error below two sequences, for any number of devices and
after any resume.

Source of the cycle: earliest deadline first, with the windows of Baruah, Cohen, Plaxton and Varvel, Proportionate
Progress, Algorithmica 15, 1996.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from gptjax.batches.pretraining import Batch, PackedWindows
from gptjax.batches.rows import ALL, Rows

LONGEST_CYCLE = 10_000
"""Shares are exact if they have a common denominator of at most this number; others are rounded to it."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Weights of the sources from a step on."""

    first_step: int
    weights: tuple[float, ...]
    """One weight for each source; they need not sum to one."""


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureWindows:
    """Windows of several sources. Each source repeats its own windows, epoch after epoch, as if it were alone."""

    sources: Mapping[str, PackedWindows]
    stages: tuple[Stage, ...]
    """In ascending order of steps; the first one begins at step 0."""

    @property
    def tokens_per_epoch(self) -> int:
        """Targets in one pass over every source."""
        return sum(windows.tokens_per_epoch for windows in self.sources.values())

    def choose(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source [B] of each sequence of the batch of `step`, and the number of its window in it [B]."""
        before = np.zeros(len(self.sources), np.int64)
        for stage, following in zip(self.stages, [*self.stages[1:], None], strict=True):
            cycle = make_cycle(stage.weights)
            if following is not None and step >= following.first_step:
                before += cycle.taken((following.first_step - stage.first_step) * batch_size)
                continue
            local = np.arange((step - stage.first_step) * batch_size, (step + 1 - stage.first_step) * batch_size)
            rounds, places = np.divmod(local, len(cycle.source_M))
            source_B = cycle.source_M[places]
            return source_B, before[source_B] + rounds * cycle.count_K[source_B] + cycle.rank_M[places]
        raise AssertionError("the first stage begins at step 0")

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> Batch:
        """Returns rows of the batch of `step`, see `PackedWindows.batch`."""
        source_B, window_B = (array[rows] for array in self.choose(step, batch_size))
        taken = {k: np.flatnonzero(source_B == k) for k in np.unique(source_B)}
        windows = list(self.sources.values())
        parts = {k: windows[k].windows(window_B[places]) for k, places in taken.items()}
        if self._needs_segments:  # a source with a single document has no segments
            parts = {
                k: part if part.segments is not None else part._replace(segments=np.zeros_like(part.inputs))
                for k, part in parts.items()
            }
        order = np.argsort(np.concatenate(list(taken.values())), kind="stable")
        fields = zip(*parts.values(), strict=True)
        return Batch(*(None if arrays[0] is None else np.concatenate(arrays)[order] for arrays in fields))

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the ranges of documents of each sequence, numbered over all sources in their order."""
        source_B, window_B = self.choose(step, batch_size)
        windows = list(self.sources.values())
        starts = np.cumsum([0, *(one.split.n_documents for one in windows)])
        chosen = zip(source_B, window_B, strict=True)
        ranges = ((int(starts[k]), pair) for k, window in chosen for pair in windows[k].documents_of(int(window)))
        return [(start + first, start + last) for start, (first, last) in ranges]

    @property
    def _needs_segments(self) -> bool:
        return any(one.split.n_documents > 1 and not one.attend_across_documents for one in self.sources.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Cycle:
    """An order of sources, which is repeated."""

    source_M: np.ndarray
    rank_M: np.ndarray
    """For each place, how often its source occurs earlier in the cycle."""
    count_K: np.ndarray
    """How often each source occurs in the cycle."""

    def taken(self, n: int) -> np.ndarray:
        """How often each source occurs in the first n numbers, [K]."""
        rounds, rest = divmod(n, len(self.source_M))
        return rounds * self.count_K + np.bincount(self.source_M[:rest], minlength=len(self.count_K))


@functools.lru_cache(maxsize=64)
def make_cycle(weights: tuple[float, ...]) -> Cycle:
    """Orders sources so that every prefix has their shares, with an error below one."""
    counts = whole_shares(weights)
    M = sum(counts)
    source_M, rank_M, taken = np.zeros(M, np.int64), np.zeros(M, np.int64), [0] * len(counts)
    for n in range(M):
        # Among the sources that may occur now without exceeding their share, take the one with the earliest deadline.
        ready = [k for k, count in enumerate(counts) if count and taken[k] * M // count <= n]
        k = min(ready, key=lambda k: -(-(taken[k] + 1) * M // counts[k]))
        source_M[n], rank_M[n] = k, taken[k]
        taken[k] += 1
    return Cycle(source_M, rank_M, np.array(counts, np.int64))


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Integers in the proportion of the weights; a weight above 0 gets at least 1."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    M = math.lcm(*(share.denominator for share in shares))
    if M <= LONGEST_CYCLE:
        return tuple(int(share * M) for share in shares)
    counts = [max(1, int(share * LONGEST_CYCLE)) if share else 0 for share in shares]
    missing = LONGEST_CYCLE - sum(counts)
    largest = sorted(range(len(shares)), key=lambda k: int(shares[k] * LONGEST_CYCLE) - shares[k] * LONGEST_CYCLE)
    for k in largest[: max(0, missing)]:
        counts[k] += 1
    return tuple(counts)
