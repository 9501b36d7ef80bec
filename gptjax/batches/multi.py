"""Batches of several tasks that share one model."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from gptjax.batches.labelled import CandidateBatch, TextBatch
from gptjax.batches.rows import ALL, Rows, take_rows


class Windows(Protocol):
    """Endless batches, each a pure function of the step."""

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass."""
        ...

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> Any:
        """Returns `rows` of the batch of `step`, a tuple of arrays whose first axis is the row."""
        ...

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns first and last documents of ranges that make up the batch of `step`, numbered in the data from 0."""
        ...


class MultiBatch(NamedTuple):
    """A batch of each task."""

    parts: dict[str, Any]
    shares: dict[str, Any]
    """float32 `[B]`, all equal: the factor of one target's loss, such that the task's mean loss gets its weight."""
    counts: Any
    """float32 `[B]`: 1 / B, so that they sum to 1 over a step."""


@dataclasses.dataclass(frozen=True)
class MultiBatches:
    """Each step uses a batch of every task; tasks with fewer examples repeat them more often."""

    windows: dict[str, Windows]
    weights: dict[str, float]

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass over every task."""
        return sum(windows.tokens_per_epoch for windows in self.windows.values())

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> MultiBatch:
        """Returns `rows` of the batch of `step`, which has `batch_size` rows of each task. All rows are built, because
        the shares depend on all of them.
        """
        parts = {name: windows.batch(step, batch_size) for name, windows in self.windows.items()}
        shares = {name: np.full(batch_size, self.weights[name] / _targets(p), np.float32) for name, p in parts.items()}
        return take_rows(MultiBatch(parts, shares, np.full(batch_size, 1.0 / batch_size, np.float32)), rows)

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the first and the last example of each row, task after task."""
        return [pair for windows in self.windows.values() for pair in windows.documents(step, batch_size)]


def _targets(batch: Any) -> float:
    """Number of targets over which a batch's losses are summed."""
    whole = isinstance(batch, (TextBatch, CandidateBatch))
    return float(batch.weights.sum() if whole else max(1, (batch.targets >= 0).sum()))
