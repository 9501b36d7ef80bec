"""Regression: one or several numbers for a text or a pair of texts."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.batches.labelled import Encoded, TextBatches
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.metric import ScoresWithMetric
from gptjax.evaluation.numbers import NumberPredictions, NumberScores, number_report, score_numbers
from gptjax.evaluation.predict import Predict, predict_rows
from gptjax.model.gpt import Compute
from gptjax.tasks.classify import plain_text
from gptjax.tasks.functions import with_metric
from gptjax.tasks.heads import compiled_predict, head_states_loss, make_predict
from gptjax.tasks.task import Compile, Kind, Source, Task
from gptjax.tasks.texts import encode_examples, encoded_task, make_rewrite
from gptjax.text.formats import Row, missing_field
from gptjax.text.labelled import Examples, Numbers, text_and_second
from gptjax.text.tokenizers.base import Tokenizer

NOT_GIVEN = ("", "nan", "<na>", "null", "none")  # as CSV files and pandas write a number that is not known


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    examples = source.examples[name]
    train, validation = (_encode(config, source.tokenizer, side) for side in (examples.train, examples.validation))
    rewrite = make_rewrite(config, source.tokenizer, examples.train)
    windows = TextBatches(train, config.task, config.seed, rewrite)
    predict = compiled(make_predict(config.model, config.task, name, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> NumberScores | ScoresWithMetric:
        found, loss = _predicted(config, predict, params, validation, config.train.micro_batch, sharding)
        return with_metric(config.task, found, score_numbers(found, loss))

    return encoded_task(
        config, examples, windows, train, validation, evaluate, f"texts with {len(config.task.means)} number(s)"
    )


def predict(
    config: Config,
    name: str,
    params: dict,
    tokenizer: Tokenizer,
    examples: Sequence[Numbers],
    batch_size: int,
    compute: Compute,
    sharding: jax.sharding.Sharding,
) -> tuple[NumberPredictions, float]:
    """See `classify.predict`."""
    compiled = compiled_predict(config.model, config.task, name, compute)
    return _predicted(config, compiled, params, _encode(config, tokenizer, examples), batch_size, sharding)


def outputs(predictions: NumberPredictions) -> Iterator[dict[str, Any]]:
    """The number of each text, or its numbers as a list."""
    for values in predictions.values_EN.tolist():
        yield {"predicted": values if len(values) > 1 else values[0]}


def with_moments(task: TaskConfig, examples: Examples) -> TaskConfig:
    """Fills in the mean and the standard deviation of the training numbers, where they are not given.

    Raises:
        UserError: A row has another number of numbers than the first one, or a number never changes.
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
    """Refuses a row with another number of numbers than the others.

    Raises:
        UserError: Naming file and row.
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
    """A number as it was read; None where none is known."""
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


def _predicted(
    config: Config, predict: Predict, params: dict, rows: Encoded, batch_size: int, sharding: jax.sharding.Sharding
) -> tuple[NumberPredictions, float]:
    means, deviations = np.array(config.task.means), np.array(config.task.deviations)
    outputs_EN, loss = predict_rows(predict, params, rows, len(means), batch_size, sharding)
    values_EN, targets_EN = (array * deviations + means for array in (outputs_EN, rows.targets))
    return NumberPredictions(values_EN, targets_EN, tuple(rows.cut.tolist())), loss


KIND = Kind(build, head_states_loss, parse_row, plain_text, predict, outputs, number_report)
