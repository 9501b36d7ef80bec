"""A task's scores together with those of a user's own function."""

import dataclasses
from typing import Protocol


class TaskScores(Protocol):
    """What every task's scores have."""

    @property
    def val_loss(self) -> float:
        """Mean loss."""
        ...

    def row(self) -> dict[str, float]:
        """What there is, for `metrics.jsonl`."""
        ...


@dataclasses.dataclass(frozen=True)
class ScoresWithMetric:
    """Scores of a task and of `task.metric`."""

    scores: TaskScores
    values: dict[str, float]
    """What the user's function returned; of a single number by the name "metric"."""

    @property
    def val_loss(self) -> float:
        """The task's."""
        return self.scores.val_loss

    def row(self) -> dict[str, float]:
        """What there is, for `metrics.jsonl`."""
        return self.scores.row() | self.values

    def __str__(self) -> str:
        return " · ".join([str(self.scores), *(f"{name} {value:.4f}" for name, value in self.values.items())])
