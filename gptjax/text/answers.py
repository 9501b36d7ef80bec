"""Rows of a context, a question and its answers → examples of `answer`."""

from collections import Counter
from typing import Any, NamedTuple

from gptjax.config.data import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.text.formats import Row
from gptjax.text.rows import field_value, text_field


class Question(NamedTuple):
    """A question about a text. `answers` is empty if it has no answer or the answer is unknown."""

    text: str
    question: str
    answers: tuple[str, ...]
    start: int
    """Character of `text` at which the first answer begins; -1 without an answer."""
    where: str


def parse_question(row: Row, task: TaskConfig, data: DataConfig, labelled: bool, _counts: Counter[str]) -> Question:
    """See `text.labelled.ParseRow`. Answers are read as `{text: [...], answer_start: [...]}`, as a list of `{text,
    answer_start}`, or as text alone, which is searched in the context.

    Raises:
        UserError: A field is missing, or an answer is not where the row says.
    """
    text = text_field(row, data.text_field)
    question = text_field(row, task.question_field, "task.question_field")
    if not labelled:
        return Question(text, question, (), -1, row.where)
    given = _answers(field_value(row, task.answers_field, "task.answers_field"), row, task)
    if not given:
        if task.no_answer:
            return Question(text, question, (), -1, row.where)
        raise UserError(
            f"{row.where}: field {task.answers_field!r} has no answer; set task.no_answer=true, or take the row out"
        )
    places = [_place(answer, start, text, row, task, data) for answer, start in given]
    return Question(text, question, tuple(answer for answer, _ in given), places[0], row.where)


def _answers(value: Any, row: Row, task: TaskConfig) -> list[tuple[str, int | None]]:
    """Answers and their starts; None if the row does not give the start."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        texts, starts = ([v] if isinstance(v, (str, int)) else v for v in (texts, starts))
        if isinstance(texts, (list, tuple)) and (starts is None or len(starts) == len(texts)):
            pairs: list[Any] = list(zip(texts, starts or [None] * len(texts), strict=True))
        else:
            pairs = [(None, None)]
    else:
        items = [value] if isinstance(value, str) else value
        items = items if isinstance(items, (list, tuple)) else [None]
        pairs = [(i.get("text"), i.get("answer_start")) if isinstance(i, dict) else (i, None) for i in items]
    checked: list[tuple[str, int | None]] = []
    for text, start in pairs:
        if not isinstance(text, str) or not text or not (start is None or isinstance(start, int)):
            raise UserError(
                f"{row.where}: field {task.answers_field!r} must be text, or have text and answer_start as SQuAD's rows"
            )
        checked.append((text, start))
    return checked


def _place(answer: str, start: int | None, text: str, row: Row, task: TaskConfig, data: DataConfig) -> int:
    """The character at which an answer begins."""
    if start is None:
        if answer not in text:
            raise UserError(
                f"{row.where}: field {task.answers_field!r}: {answer!r} is nowhere in field {data.text_field!r}; the"
                " answer must be a part of the text"
            )
        return text.index(answer)
    if start < 0 or text[start : start + len(answer)] != answer:
        found = text[start : start + len(answer)] if 0 <= start < len(text) else "nothing"
        raise UserError(
            f"{row.where}: field {task.answers_field!r}: {answer!r} is not at character {start} of field"
            f" {data.text_field!r}, where {found!r} is; answer_start counts characters from 0"
        )
    return start
