"""Multiple choice: scores several candidates, each appended to the same text (GPT-1, section 3.3)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.batches.labelled import CandidateSet
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.choices import ChoicePredictions, choice_report, score_choices
from gptjax.tasks.head_task import HeadTask, count_note, head_kind
from gptjax.tasks.texts import encode_choices
from gptjax.text.formats import Row, missing_field
from gptjax.text.labelled import Choice, Examples, string_list
from gptjax.text.rows import text_field


def outputs(predictions: ChoicePredictions) -> Iterator[dict[str, Any]]:
    """The number of the chosen candidate of each row, from 0, and the probabilities of all candidates."""
    for probabilities, count in zip(predictions.probabilities_EK, predictions.counts, strict=True):
        yield {"predicted": int(probabilities[:count].argmax()), "probabilities": probabilities[:count].tolist()}


def parse_row(row: Row, task: TaskConfig, data: DataConfig, labelled: bool, _counts: Counter[str]) -> Choice:
    """See `text.labelled.ParseRow`."""
    text = text_field(row, data.text_field)
    candidates = string_list(row, task.candidates_field, "task.candidates_field")
    if len(candidates) < 2:
        raise UserError(f"{row.where}: field {task.candidates_field!r} has {len(candidates)} candidate(s), needs two")
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, str) or not candidate.strip():
            raise UserError(
                f"{row.where}: candidate {number} of field {task.candidates_field!r} is {candidate!r}, must be a text"
            )
    if not labelled:
        return Choice(text, candidates, -1, row.where)
    if task.label_field not in row.values:
        raise missing_field(row.where, task.label_field, "task.label_field", row.values)
    return Choice(text, candidates, _answer(row.values[task.label_field], candidates, row, task), row.where)


def _answer(value: Any, candidates: tuple[str, ...], row: Row, task: TaskConfig) -> int:
    """The number of the right candidate, of a row that gives the number or the text."""
    if isinstance(value, str) and candidates.count(value) == 1:
        return candidates.index(value)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(candidates):
        return value
    raise UserError(
        f"{row.where}: field {task.label_field!r} holds {value!r}; must be one of the {len(candidates)} candidates of"
        f" {task.candidates_field!r}: a number from 0 to {len(candidates) - 1}, or the text of one"
    )


def _decode(
    _config: Config, _examples: Sequence[Choice], rows: CandidateSet, probabilities_EK: np.ndarray
) -> ChoicePredictions:
    counts = tuple(len(row) for row in rows.tokens)
    probabilities_EK[np.arange(rows.candidates)[None] >= np.array(counts)[:, None]] = 0.0
    return ChoicePredictions(probabilities_EK, rows.targets, counts, tuple(rows.cut.tolist()))


def _note(config: Config, examples: Examples, train: CandidateSet, validation: CandidateSet) -> str:
    return count_note(config, examples, train, validation, f"rows of up to {train.candidates} candidates")


HEAD = HeadTask(encode_choices, lambda _, rows: rows.candidates, _decode, score_choices, _note)
KIND = head_kind(
    HEAD, parse_row, lambda example: "\n".join((example.text, *example.candidates)), outputs, choice_report
)
