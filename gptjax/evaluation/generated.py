"""Compares generated answers with accepted ones."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.evaluation.statistics import mean


class AnswerResults(NamedTuple):
    """Results of each item."""

    right: np.ndarray
    """Whether the answer is accepted."""
    answers: np.ndarray
    """Extracted answers; empty if the pattern did not match."""
    accepted: np.ndarray
    """The accepted answers of each item."""

    def __str__(self) -> str:
        return f"exact match {mean(self.right)} · {len(self.right):,} items"


def answer_results(answers: Sequence[str | None], accepted: Sequence[tuple[str, ...]]) -> AnswerResults:
    """Compares each answer of `extract_answer` with the accepted ones."""
    right = [is_right(answer, texts) for answer, texts in zip(answers, accepted, strict=True)]
    listed = np.empty(len(accepted), object)
    listed[:] = accepted
    return AnswerResults(np.array(right, float), np.array([answer or "" for answer in answers], object), listed)


def extract_answer(text: str, pattern: str) -> str | None:
    """Extracts the answer from a generated text: the first group of the first match of `pattern`, or the whole match.

    An empty pattern takes the whole text. White space around the answer is removed.

    Returns:
        The answer; None if the pattern does not match.
    """
    if not pattern:
        return text.strip()
    match = re.search(pattern, text)
    if match is None:
        return None
    found = match.group(1) if match.re.groups else match.group()
    return None if found is None else found.strip()


def is_right(answer: str | None, accepted: Sequence[str]) -> bool:
    """Whether an answer equals an accepted one."""
    return answer is not None and answer in [text.strip() for text in accepted]
