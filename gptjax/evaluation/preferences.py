"""Scores of preference models: how often the preferred response has the higher score."""

import dataclasses

import numpy as np

from gptjax.evaluation.metric import TaskScores


@dataclasses.dataclass(frozen=True)
class PreferenceScores(TaskScores):
    """Scores of an evaluation, with their names in `metrics.jsonl`."""

    val_loss: float
    """Nats per pair. Equal scores give ln 2."""
    accuracy: float
    """Share of pairs whose chosen response has the higher score; equal scores count 1/2."""
    margin: float
    """Mean of the chosen response's score minus that of the rejected one."""

    def __str__(self) -> str:
        return f"loss {self.val_loss:.4f} · accuracy {self.accuracy:.4f} · margin {self.margin:.4f}"


@dataclasses.dataclass(frozen=True)
class ScorePredictions:
    """Scores of responses."""

    scores_ES: np.ndarray
    """Scores of the chosen and the rejected response, or of a single response."""
    cut: tuple[bool, ...] = ()
    """For each row, whether a response was cut."""

    @property
    def count(self) -> int:
        """Number of scored rows."""
        return len(self.scores_ES)


def score_preferences(predictions: ScorePredictions, val_loss: float) -> PreferenceScores:
    """Scores pairs: column 0 is the chosen response, column 1 the rejected one."""
    margins = predictions.scores_ES[:, 0].astype(np.float64) - predictions.scores_ES[:, 1]
    return PreferenceScores(val_loss, float(((margins > 0) + 0.5 * (margins == 0)).mean()), float(margins.mean()))


def preference_report(predictions: ScorePredictions, val_loss: float) -> str:
    """The scores as text."""
    return f"{score_preferences(predictions, val_loss)} · {len(predictions.scores_ES):,} pairs"
