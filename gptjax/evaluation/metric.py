"""Combines a task's scores with those of the user's metric."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """Scores of an evaluation, with their names in `metrics.jsonl`."""

    val_loss: float
    """Mean loss."""

    def row(self) -> dict[str, float]:
        """The scores that exist, for `metrics.jsonl`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class ScoresWithMetric:
    """Scores of a task and of `task.metric`."""

    scores: TaskScores
    values: dict[str, float]
    """The values of the user's function; a single number is named "metric"."""

    @property
    def val_loss(self) -> float:
        """The mean loss of the task."""
        return self.scores.val_loss

    def row(self) -> dict[str, float]:
        """The scores for `metrics.jsonl`."""
        return self.scores.row() | self.values

    def __str__(self) -> str:
        return " · ".join([str(self.scores), *(f"{name} {value:.4f}" for name, value in self.values.items())])
