"""Scores of regression.

Shape suffixes: E examples, N numbers per example.
"""

import dataclasses

import numpy as np

from gptjax.evaluation.metric import TaskScores


@dataclasses.dataclass(frozen=True)
class NumberPredictions:
    """Predicted and true numbers, in the units of the data."""

    values_EN: np.ndarray
    targets_EN: np.ndarray
    """NaN where unknown."""
    cut: tuple[bool, ...] = ()
    """For each text, whether it was cut."""

    @property
    def count(self) -> int:
        """Number of scored texts."""
        return len(self.targets_EN)

    def named(self) -> tuple[list, list]:
        """Predicted and true values: a number or a list of numbers for each text."""
        one = self.values_EN.shape[1] == 1
        predicted, truth = ((v[:, 0] if one else v).tolist() for v in (self.values_EN, self.targets_EN))
        return predicted, truth


@dataclasses.dataclass(frozen=True)
class NumberScores(TaskScores):
    """Scores of an evaluation, with their names in `metrics.jsonl`."""

    val_loss: float
    """Mean squared error of standardized numbers. Always predicting the mean of the training rows gives 1."""
    mae: float
    """Mean absolute error in the units of the data."""
    pearson: float
    """Pearson correlation, averaged over the numbers of a row; 0 if predictions or targets are constant."""
    spearman: float
    """Spearman rank correlation, averaged in the same way."""

    def __str__(self) -> str:
        return (
            f"loss {self.val_loss:.4f} · mean absolute error {self.mae:.4g} · Pearson {self.pearson:.4f}"
            f" · Spearman {self.spearman:.4f}"
        )


def score_numbers(predictions: NumberPredictions, val_loss: float) -> NumberScores:
    """Scores predictions of examples whose numbers are known."""
    values_EN, targets_EN = predictions.values_EN.astype(np.float64), predictions.targets_EN.astype(np.float64)
    pairs = list(zip(values_EN.T, targets_EN.T, strict=True))
    return NumberScores(
        val_loss,
        float(np.abs(values_EN - targets_EN).mean()),
        float(np.mean([pearson(*pair) for pair in pairs])),
        float(np.mean([pearson(*map(ranks, pair)) for pair in pairs])),
    )


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two vectors; 0 if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def number_report(predictions: NumberPredictions, val_loss: float) -> str:
    """The scores as text; if a row has several numbers, also the scores of each."""
    lines = [str(score_numbers(predictions, val_loss))]
    N = predictions.values_EN.shape[1]
    for n in range(N if N > 1 else 0):
        values, targets = predictions.values_EN[:, n : n + 1], predictions.targets_EN[:, n : n + 1]
        one = score_numbers(NumberPredictions(values, targets), val_loss)
        lines.append(
            f"number {n}: mean absolute error {one.mae:.4g} · Pearson {one.pearson:.4f} · Spearman {one.spearman:.4f}"
        )
    return "\n".join(lines)
