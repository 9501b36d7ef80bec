"""Batches of several tasks at once, for a model that they share."""

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
        """Returns rows of the batch of `step`, a tuple of arrays whose first axis is the row."""
        ...

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the first and the last document of rows of the batch of `step`, as numbered in the data from 0."""
        ...


class MultiBatch(NamedTuple):
    """A batch of each task."""

    parts: dict[str, Any]
    shares: dict[str, Any]
    """float32 `[B]`, all the same: what one target of a task counts, so that its mean loss gets its weight."""
    counts: Any
    """float32 `[B]`: 1 / B, so that a step's add up to 1."""


@dataclasses.dataclass(frozen=True)
class MultiBatches:
    """Each step takes a batch of every task; tasks with fewer examples come round more often."""

    windows: dict[str, Windows]
    weights: dict[str, float]

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in one pass over every task."""
        return sum(windows.tokens_per_epoch for windows in self.windows.values())

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> MultiBatch:
        """Returns rows of the batch of `step`, `batch_size` of each task in all; every one is made, for the shares."""
        parts = {name: windows.batch(step, batch_size) for name, windows in self.windows.items()}
        shares = {name: np.full(batch_size, self.weights[name] / _targets(p), np.float32) for name, p in parts.items()}
        return take_rows(MultiBatch(parts, shares, np.full(batch_size, 1.0 / batch_size, np.float32)), rows)

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the first and the last example of each row, those of every task in turn."""
        return [pair for windows in self.windows.values() for pair in windows.documents(step, batch_size)]


def _targets(batch: Any) -> float:
    """What a batch's losses are summed over."""
    whole = isinstance(batch, (TextBatch, CandidateBatch))
    return float(batch.weights.sum() if whole else max(1, (batch.targets >= 0).sum()))
