"""Evaluates predicted labels: scores, a table and a figure.

Scores of labels follow the definitions of scikit-learn (`tests/test_label_scores.py`). seqeval scores spans.

Shape suffixes: E examples (texts or words), N labels.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.metric import TaskScores

CALIBRATION_BINS = 15


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predicted probabilities, and the true labels."""

    probabilities_EN: np.ndarray
    targets: np.ndarray
    """`[E]` label numbers; for multi-label texts `[E, N]` of 0 and 1."""
    labels: tuple[str, ...]
    sentences: tuple[int, ...] = ()
    """Number of words in each sentence, if examples are words."""
    cut: tuple[bool, ...] = ()
    """For each text or sentence, whether it was truncated."""

    @property
    def chosen(self) -> np.ndarray:
        """Predicted labels, shaped like `targets`: the argmax, or for multi-label texts all above one half."""
        if self.targets.ndim == 2:
            return (self.probabilities_EN > 0.5).astype(np.int64)
        return self.probabilities_EN.argmax(axis=-1)

    @property
    def count(self) -> int:
        """Number of scored texts or words."""
        return len(self.targets)

    def named(self) -> tuple[list, list]:
        """Predicted and true names: a label or a list of labels for each text, a list of tags for each sentence."""
        return self._names(self.chosen), self._names(self.targets)

    def _names(self, values: np.ndarray) -> list:
        if values.ndim == 2:
            return [[label for label, has in zip(self.labels, row, strict=True) if has] for row in values]
        names = [self.labels[n] for n in values]
        return list(as_sentences(names, self.sentences)) if self.sentences else names


@dataclasses.dataclass(frozen=True)
class LabelScores(TaskScores):
    """Scores of an evaluation, with their names in `metrics.jsonl`."""

    val_loss: float
    """Nats per label."""
    accuracy: float
    """Share of examples whose labels are all correct."""
    macro_f1: float
    """Unweighted mean of the labels' F1."""
    span_f1: float | None = None
    """F1 of whole spans, for B-, I- and O tags; None for other labels."""

    def __str__(self) -> str:
        span = "" if self.span_f1 is None else f" · span F1 {self.span_f1:.4f}"
        return f"loss {self.val_loss:.4f} · accuracy {self.accuracy:.4f} · macro F1 {self.macro_f1:.4f}{span}"


@dataclasses.dataclass(frozen=True)
class MultiScores:
    """Scores of a multi-task run."""

    val_loss: float
    """Weighted mean over tasks."""
    parts: dict[str, Any]
    """Scores of each task."""

    def row(self) -> dict[str, float]:
        """Returns the scores for `metrics.jsonl`, with names such as `spam/accuracy`."""
        named = {f"{name}/{key}": value for name, scores in self.parts.items() for key, value in scores.row().items()}
        return {"val_loss": self.val_loss} | named

    def __str__(self) -> str:
        return " · ".join([f"loss {self.val_loss:.4f}", *(f"{name}: {scores}" for name, scores in self.parts.items())])


def with_labels(predictions: Predictions, labels: tuple[str, ...]) -> Predictions:
    """The same predictions over more labels, or over labels in another order."""
    places = np.array([labels.index(label) for label in predictions.labels])
    probabilities_EN = np.zeros((len(predictions.probabilities_EN), len(labels)), np.float32)
    probabilities_EN[:, places] = predictions.probabilities_EN
    targets = np.where(predictions.targets < 0, -1, places[predictions.targets])
    return dataclasses.replace(predictions, probabilities_EN=probabilities_EN, targets=targets, labels=labels)


def are_spans(labels: Sequence[str]) -> bool:
    """Whether tags mark spans: each is O or begins with B- or I-."""
    return bool(labels) and all(label == "O" or label[:2] in ("B-", "I-") for label in labels)


def require_seqeval() -> None:
    """Checks before training that spans can be scored.

    Raises:
        UserError: seqeval is missing; the message names the extra.
    """
    try:
        import seqeval.metrics  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the scores of spans need {error.name}, of the extra finetune: pip install -e '.[finetune]'"
        ) from None


def score(predictions: Predictions, val_loss: float) -> LabelScores:
    """Scores predictions.

    The mean F1 ignores labels that no example has and that are never predicted, except for multi-label texts.
    """
    truth, chosen = predictions.targets, predictions.chosen
    right = (truth == chosen).all(axis=-1) if truth.ndim == 2 else truth == chosen
    each = per_label(predictions)
    counted = np.ones(len(predictions.labels), bool) if truth.ndim == 2 else each.support + each.predicted > 0
    macro = float(each.f1[counted].mean()) if counted.any() else 0.0
    return LabelScores(val_loss, float(right.mean()) if len(right) else 0.0, macro, _span_f1(predictions))


class LabelTable(NamedTuple):
    """Scores of each label, `[N]`; 0 / 0 counts as 0."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray
    """Number of examples that have the label."""
    predicted: np.ndarray
    """Number of examples for which the label was predicted."""


def per_label(predictions: Predictions) -> LabelTable:
    """Computes precision, recall and F1 of each label."""
    truth_EN, chosen_EN = predictions.targets, predictions.chosen
    if truth_EN.ndim == 1:
        truth_EN, chosen_EN = (
            values[:, None] == np.arange(len(predictions.labels)) for values in (truth_EN, chosen_EN)
        )
    truth_EN, chosen_EN = truth_EN.astype(bool), chosen_EN.astype(bool)
    both, support, predicted = (mask.sum(axis=0) for mask in (truth_EN & chosen_EN, truth_EN, chosen_EN))
    precision, recall = _quotient(both, predicted), _quotient(both, support)
    return LabelTable(precision, recall, _quotient(2 * both, support + predicted), support, predicted)


def _quotient(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def expected_calibration_error(predictions: Predictions) -> float:
    """Mean distance between confidence and accuracy over equal bins of confidence (arXiv:1706.04599, section 2)."""
    probabilities, truth = predictions.probabilities_EN, predictions.targets
    if truth.ndim == 2:  # each label is a separate yes-or-no prediction
        confidence = np.maximum(probabilities, 1.0 - probabilities).ravel()
        right = (predictions.chosen == truth).ravel()
    else:
        confidence, right = probabilities.max(axis=-1), predictions.chosen == truth
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    gaps = np.bincount(bins, confidence - right, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / max(1, counts.sum()))


def confusion(predictions: Predictions) -> np.ndarray:
    """Confusion matrix `[N, N]` of counts: rows are true labels, columns predictions; single-label only."""
    counts = np.zeros((len(predictions.labels),) * 2, np.int64)
    np.add.at(counts, (predictions.targets, predictions.chosen), 1)
    return counts


def table(predictions: Predictions, scores: LabelScores) -> str:
    """Formats overall scores, scores of each label, calibration and the confusion matrix as text."""
    labels, each = predictions.labels, per_label(predictions)
    columns = zip(labels, each.precision, each.recall, each.f1, each.support, strict=True)
    width = max(5, *(len(label) for label in labels))
    lines = [str(scores), f"calibration error {expected_calibration_error(predictions):.4f}", ""]
    lines.append(f"{'label':{width}}  precision  recall      F1  examples")
    for label, precision, recall, f1, support in columns:
        lines.append(f"{label:{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {support:8}")
    if predictions.targets.ndim == 1:
        lines += ["", *_confusions(predictions, width)]
    return "\n".join(lines)


def score_table(predictions: Predictions, val_loss: float) -> str:
    """Scores and their table as text."""
    return table(predictions, score(predictions, val_loss))


def save_confusion(predictions: Predictions, path: Path) -> None:
    """Draws the confusion matrix, with rows normalised to sum to 1.

    Raises:
        UserError: matplotlib is missing, or texts are multi-label.
    """
    if predictions.targets.ndim == 2:
        raise UserError("figure: a text with several labels has no confusion matrix; leave the option out")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figure needs matplotlib, of the extra finetune: pip install -e '.[finetune]'") from None
    counts = confusion(predictions)
    size = 2.5 + 0.25 * len(counts)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="truth")
    image = axes.imshow(counts / np.maximum(1, counts.sum(axis=1, keepdims=True)), cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(counts))
    axes.set_xticks(ticks, predictions.labels, rotation=90)
    axes.set_yticks(ticks, predictions.labels)
    if len(counts) <= 12:
        for i, j in np.ndindex(*counts.shape):
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", color="black")
    figure.colorbar(image, label="share of the label's examples")
    figure.savefig(path)


def _confusions(predictions: Predictions, width: int) -> list[str]:
    """The confusion matrix; with more than 12 labels, the pairs that are confused most often."""
    counts, labels = confusion(predictions), predictions.labels
    if len(labels) <= 12:
        cells = max(width, len(str(counts.max())))
        head = f"{'':{width}}  " + "  ".join(f"{label:>{cells}}" for label in labels) + "   (predicted)"
        rows = (
            f"{label:{width}}  " + "  ".join(f"{n:{cells}}" for n in row)
            for label, row in zip(labels, counts, strict=True)
        )
        return [head, *rows]
    wrong = counts - np.diag(np.diag(counts))
    pairs = sorted(np.argwhere(wrong).tolist(), key=lambda pair: -wrong[tuple(pair)])[:20]
    return ["most frequent confusions (true label, predicted label, count):"] + [
        f"{labels[i]:{width}}  {labels[j]:{width}}  {wrong[i, j]}" for i, j in pairs
    ]


def _span_f1(predictions: Predictions) -> float | None:
    # A tag that training has not seen has probability 0; where it marks no span, it is none.
    known_N = predictions.probabilities_EN.max(axis=0, initial=0) > 0
    known = [label for label, is_known in zip(predictions.labels, known_N, strict=True) if is_known]
    if not predictions.sentences or not are_spans(known):
        return None
    labels = [label if are_spans([label]) else "O" for label in predictions.labels]
    from seqeval.metrics import f1_score

    ends = np.cumsum(predictions.sentences)[:-1]
    truth, chosen = (
        [[labels[n] for n in part] for part in np.split(values, ends)]
        for values in (predictions.targets, predictions.chosen)
    )
    return float(f1_score(truth, chosen))  # pyright: ignore[reportArgumentType]


def as_sentences(values: Sequence[Any], lengths: Sequence[int]) -> list[Sequence[Any]]:
    """Splits values of all words into one sequence for each sentence."""
    ends = np.cumsum(lengths)
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]
