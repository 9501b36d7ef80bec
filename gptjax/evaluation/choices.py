"""Scores of multiple choice with a head.

Shape suffixes: E examples, K largest number of candidates.
"""

import dataclasses

import numpy as np

from gptjax.evaluation.metric import TaskScores


@dataclasses.dataclass(frozen=True)
class ChoicePredictions:
    """Predicted probabilities of candidates, and the correct candidates."""

    probabilities_EK: np.ndarray
    """0 for candidates that an example does not have."""
    targets: np.ndarray
    """`[E]` number of the correct candidate; -1 if unknown."""
    counts: tuple[int, ...]
    """Number of candidates of each example."""
    cut: tuple[bool, ...] = ()
    """For each example, whether a text was cut."""

    @property
    def count(self) -> int:
        """Number of scored examples."""
        return len(self.targets)

    def named(self) -> tuple[list, list]:
        """The numbers of the predicted and the correct candidate of each example."""
        return self.probabilities_EK.argmax(axis=-1).tolist(), self.targets.tolist()


@dataclasses.dataclass(frozen=True)
class ChoiceScores(TaskScores):
    """Scores of an evaluation, with their names in `metrics.jsonl`."""

    val_loss: float
    """Nats per example."""
    accuracy: float
    """Share of examples whose correct candidate has the highest probability."""

    def __str__(self) -> str:
        return f"loss {self.val_loss:.4f} · accuracy {self.accuracy:.4f}"


def score_choices(predictions: ChoicePredictions, val_loss: float) -> ChoiceScores:
    """Scores predictions of examples whose correct candidate is known."""
    return ChoiceScores(val_loss, float((predictions.probabilities_EK.argmax(axis=-1) == predictions.targets).mean()))


def choice_report(predictions: ChoicePredictions, val_loss: float) -> str:
    """The scores as text, with the accuracy of random guessing."""
    guess = float(np.mean([1 / count for count in predictions.counts]))
    return f"{score_choices(predictions, val_loss)} · {len(predictions.counts):,} examples, a guess has {guess:.4f}"
