"""How often the right one of several candidates is chosen.

Shape suffixes: E examples, K most candidates of an example.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ChoicePredictions:
    """Probabilities of candidates and the truth."""

    probabilities_EK: np.ndarray
    """0 for candidates that an example does not have."""
    targets: np.ndarray
    """`[E]` number of the right candidate; -1 where unknown."""
    counts: tuple[int, ...]
    """Candidates of each example."""
    cut: tuple[bool, ...] = ()
    """Of each example, whether a candidate or the text before it has more tokens than the model reads."""

    @property
    def count(self) -> int:
        """Rows that are scored."""
        return len(self.targets)

    def named(self) -> tuple[list, list]:
        """The number of the chosen candidate of each example, and that of the right one."""
        return self.probabilities_EK.argmax(axis=-1).tolist(), self.targets.tolist()


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """What a choice is judged by at each evaluation; the names are those of `metrics.jsonl`."""

    val_loss: float
    """Nats per example."""
    accuracy: float
    """Share of examples of which the right candidate has the highest probability."""

    def row(self) -> dict[str, float]:
        """What there is, for `metrics.jsonl`."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"loss {self.val_loss:.4f} · accuracy {self.accuracy:.4f}"


def score_choices(predictions: ChoicePredictions, val_loss: float) -> ChoiceScores:
    """Scores predictions of examples whose right candidate is known."""
    return ChoiceScores(val_loss, float((predictions.probabilities_EK.argmax(axis=-1) == predictions.targets).mean()))


def choice_report(predictions: ChoicePredictions, val_loss: float) -> str:
    """The scores as text, beside the accuracy of a guess."""
    guess = float(np.mean([1 / count for count in predictions.counts]))
    return f"{score_choices(predictions, val_loss)} · {len(predictions.counts):,} examples, a guess has {guess:.4f}"
