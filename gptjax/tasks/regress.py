"""Regression: one or several numbers for a text or a pair of texts."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.batches.labelled import Encoded
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.numbers import NumberPredictions, number_report, score_numbers
from gptjax.tasks.classify import plain_text
from gptjax.tasks.head_task import HeadTask, count_note, head_kind
from gptjax.tasks.texts import encode_examples, make_rewrite
from gptjax.text.formats import Row, missing_field
from gptjax.text.labelled import Examples, Numbers, text_and_second
from gptjax.text.tokenizers.base import Tokenizer

NOT_GIVEN = ("", "nan", "<na>", "null", "none")  # how CSV files and pandas write a missing number


def outputs(predictions: NumberPredictions) -> Iterator[dict[str, Any]]:
    """The number of each text, or its numbers as a list."""
    for values in predictions.values_EN.tolist():
        yield {"predicted": values if len(values) > 1 else values[0]}


def with_moments(task: TaskConfig, examples: Examples) -> TaskConfig:
    """Adds the mean and the standard deviation of the training numbers to the config, unless they are given.

    Raises:
        UserError: Rows have different counts of numbers, or a number is the same in all rows.
    """
    train: Sequence[Numbers] = examples.train
    count = len(train[0].values)
    for example in (*train, *examples.validation):
        check_count(example, count)
    if task.means:
        return task
    values_EN = np.array([example.values for example in train], np.float64)
    for n, deviation in enumerate(values_EN.std(axis=0).tolist()):
        if not deviation > 0:
            raise UserError(
                f"{train[0].where}: number {n} of task.label_field={task.label_field!r} is {train[0].values[n]} in all"
                f" {len(train)} training rows; regression needs numbers that differ"
            )
    means, deviations = (tuple(map(float, moment)) for moment in (values_EN.mean(axis=0), values_EN.std(axis=0)))
    return dataclasses.replace(task, means=means, deviations=deviations)


def check_count(example: Numbers, count: int) -> None:
    """Checks that a row has `count` numbers.

    Raises:
        UserError: It has not; the message names file and row.
    """
    if len(example.values) != count:
        raise UserError(f"{example.where}: has {len(example.values)} number(s), must have {count} as the training rows")


def parse_row(row: Row, task: TaskConfig, data: DataConfig, labelled: bool, counts: Counter[str]) -> Numbers | None:
    """See `text.labelled.ParseRow`."""
    text, second = text_and_second(row, task, data)
    if not labelled:
        return Numbers(text, (), row.where, second)
    if task.label_field not in row.values:
        raise missing_field(row.where, task.label_field, "task.label_field", row.values)
    given = row.values[task.label_field]
    values = [_number(value, row, task) for value in (given if isinstance(given, (list, tuple)) else [given])]
    if not values:
        raise UserError(f"{row.where}: field {task.label_field!r} is an empty list; give a number or several")
    if None in values:
        counts["missing_number"] += 1
        return None
    return Numbers(text, tuple(value for value in values if value is not None), row.where, second)


def _number(value: Any, row: Row, task: TaskConfig) -> float | None:
    """Parses a number; None for a missing one."""
    if value is None or (isinstance(value, str) and value.strip().lower() in NOT_GIVEN):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(
            f"{row.where}: field {task.label_field!r} holds {value!r}; task.kind=regress needs a number or a list of"
            " numbers (labels are for classify)"
        ) from None
    if math.isinf(number):
        raise UserError(f"{row.where}: field {task.label_field!r} holds {value!r}; must be finite")
    return None if math.isnan(number) else number


def _encode(config: Config, tokenizer: Tokenizer, examples: Sequence[Numbers]) -> Encoded:
    """Texts and their standardized numbers."""
    unknown = (math.nan,) * len(config.task.means)
    targets_EN = np.array([example.values or unknown for example in examples]).reshape(len(examples), len(unknown))
    standardized_EN = (targets_EN - config.task.means) / config.task.deviations
    return encode_examples(config, tokenizer, examples, standardized_EN.astype(np.float32))


def _decode(config: Config, _examples: Sequence[Numbers], rows: Encoded, outputs_EN: np.ndarray) -> NumberPredictions:
    means, deviations = np.array(config.task.means), np.array(config.task.deviations)
    values_EN, targets_EN = (array * deviations + means for array in (outputs_EN, rows.targets))
    return NumberPredictions(values_EN, targets_EN, tuple(rows.cut.tolist()))


def _note(config: Config, examples: Examples, train: Encoded, validation: Encoded) -> str:
    return count_note(config, examples, train, validation, f"texts with {len(config.task.means)} number(s)")


HEAD = HeadTask(_encode, lambda config, _: len(config.task.means), _decode, score_numbers, _note, make_rewrite)
KIND = head_kind(HEAD, parse_row, plain_text, outputs, number_report)
