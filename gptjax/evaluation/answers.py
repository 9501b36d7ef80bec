"""Scores of extractive question answering, as in SQuAD (arXiv:1606.05250, section 6.1, and its evaluation script)."""

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Sequence

from gptjax.evaluation.metric import TaskScores

PUNCTUATION = set(string.punctuation)


@dataclasses.dataclass(frozen=True)
class AnswerPredictions:
    """Predicted and true answers; an empty text means "no answer"."""

    predicted: tuple[str, ...]
    starts: tuple[int, ...]
    """Character at which each predicted answer begins; -1: no answer."""
    truth: tuple[tuple[str, ...], ...]
    """Acceptable answers of each question; empty if it has no answer."""
    cut: tuple[bool, ...] = ()
    """For each question, whether its text has several windows."""

    @property
    def count(self) -> int:
        """Number of scored questions."""
        return len(self.truth)

    def named(self) -> tuple[list, list]:
        """The predicted answers, and the acceptable ones of each question."""
        return list(self.predicted), [list(answers) for answers in self.truth]


@dataclasses.dataclass(frozen=True)
class AnswerScores(TaskScores):
    """Scores of extractive question answering, with their names in `metrics.jsonl`."""

    val_loss: float
    """Mean cross-entropy of the first and last token of the answer, in nats."""
    exact_match: float
    """Share of answers that equal an acceptable one, without case, punctuation, articles and spaces."""
    f1: float
    """Mean word F1 with the best-matching acceptable answer."""

    def __str__(self) -> str:
        return f"loss {self.val_loss:.4f} · exact match {self.exact_match:.4f} · F1 {self.f1:.4f}"


def score_answers(predictions: AnswerPredictions, val_loss: float) -> AnswerScores:
    """Scores predicted answers of questions whose answers are known."""
    exact, f1 = 0.0, 0.0
    for predicted, truth in zip(predictions.predicted, predictions.truth, strict=True):
        acceptable = [answer for answer in truth if normalised_answer(answer)] or [""]
        exact += max(normalised_answer(predicted) == normalised_answer(answer) for answer in acceptable)
        f1 += max(word_f1(predicted, answer) for answer in acceptable)
    return AnswerScores(val_loss, exact / predictions.count, f1 / predictions.count)


def normalised_answer(text: str) -> str:
    """Lower case without punctuation, articles and extra spaces."""
    kept = "".join(c for c in text.lower() if c not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def word_f1(predicted: str, answer: str) -> float:
    """F1 of the words of two answers. If an answer has no words: 1 if both have none, else 0."""
    words: Sequence[list[str]] = [normalised_answer(text).split() for text in (predicted, answer)]
    if not all(words):
        return float(words[0] == words[1])
    common = sum((Counter(words[0]) & Counter(words[1])).values())
    return 2 * common / (len(words[0]) + len(words[1]))


def answer_report(predictions: AnswerPredictions, val_loss: float) -> str:
    """The scores as text."""
    return f"{score_answers(predictions, val_loss)} · {predictions.count:,} questions"
