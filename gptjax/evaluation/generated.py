"""Answers that a model generates, compared with those that are right."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.evaluation.statistics import mean


class AnswerResults(NamedTuple):
    """What was measured of each item."""

    right: np.ndarray
    """Whether the answer is one of those that are accepted."""
    answers: np.ndarray
    """Texts; empty where the pattern matched nowhere."""
    accepted: np.ndarray
    """Of each item, a tuple of texts."""

    def __str__(self) -> str:
        return f"exact match {mean(self.right)} · {len(self.right):,} items"


def answer_results(answers: Sequence[str | None], accepted: Sequence[tuple[str, ...]]) -> AnswerResults:
    """Compares each answer, see `extract_answer`, with the texts that are accepted."""
    right = [is_right(answer, texts) for answer, texts in zip(answers, accepted, strict=True)]
    listed = np.empty(len(accepted), object)
    listed[:] = accepted
    return AnswerResults(np.array(right, float), np.array([answer or "" for answer in answers], object), listed)


def extract_answer(text: str, pattern: str) -> str | None:
    """The answer in a generated text: the first group of the first match of `pattern` (without groups: the match).

    An empty pattern takes all of the text. White space around the answer does not count.

    Returns:
        The answer; None: the pattern matches nowhere.
    """
    if not pattern:
        return text.strip()
    match = re.search(pattern, text)
    if match is None:
        return None
    found = match.group(1) if match.re.groups else match.group()
    return None if found is None else found.strip()


def is_right(answer: str | None, accepted: Sequence[str]) -> bool:
    """Whether an answer equals one of those that are accepted."""
    return answer is not None and answer in [text.strip() for text in accepted]
