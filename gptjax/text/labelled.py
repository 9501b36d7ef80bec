"""Rows → examples that name what is to be learned, checked; and which of them are held out."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import xxhash

from gptjax.config.run import DataConfig
from gptjax.config.task import LABELLED, TaskConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.text.rows import Row, field, limited, read_dataset_rows, read_rows


class Text(NamedTuple):
    """A text of `classify`; `labels` is empty where none is known, and has several only with `multi_label`."""

    text: str
    labels: tuple[str, ...]
    where: str


class Words(NamedTuple):
    """A sentence of `tag`; `tags` is empty where none are known."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    where: str


class Chat(NamedTuple):
    """A chat of `instruct`, cut into pieces of text and whether each is to be learned."""

    pieces: tuple[tuple[str, bool], ...]
    where: str


Example = Text | Words | Chat


class Examples(NamedTuple):
    """What a run learns from and is measured on."""

    train: list
    validation: list
    labels: tuple[str, ...]
    multi_label: bool


ParseRow = Callable[[Row, TaskConfig, DataConfig, bool], Any]
"""Makes an example of a row; the last argument tells whether it must have its label; if not, none is read."""


def read_examples(parse_row: ParseRow, task: TaskConfig, data: DataConfig) -> Examples:
    """Reads and splits a task's rows, and finds the names of its labels.

    Raises:
        UserError: A row is wrong, a label has no training row, a validation row's label is unseen in training, or a
            side has no row; the message names file and row.
    """
    if not (data.path or data.hf_dataset):
        raise UserError("no rows: set one of data.path and data.hf_dataset")
    rows = read_dataset_rows(data) if data.hf_dataset else read_rows(data.path, "data.path")
    examples = [parse_row(row, task, data, True) for row in limited(rows, data)]
    if task.validation_path:
        rows = read_rows(task.validation_path, "task.validation_path")
        train, validation = examples, [parse_row(row, task, data, True) for row in rows]
    else:
        held_out = [_hash(example) < data.validation_fraction * 2**64 for example in examples]
        train = [example for example, held in zip(examples, held_out, strict=True) if not held]
        validation = [example for example, held in zip(examples, held_out, strict=True) if held]
    if not train or not validation:
        raise UserError(
            f"data: {len(train)} rows to train on and {len(validation)} to validate on; give more rows,"
            " or task.validation_path, or another data.validation_fraction"
        )
    if task.kind not in LABELLED:
        return Examples(train, validation, (), False)
    labels = _label_names(task, train)
    for example in validation:
        check_labels(example, labels)
    several = task.multi_label or any(isinstance(e, Text) and len(e.labels) != 1 for e in (*train, *validation))
    return Examples(train, validation, labels, several)


def example_labels(example: Text | Words) -> tuple[str, ...]:
    """The labels of an example, one by one."""
    return example.labels if isinstance(example, Text) else example.tags


def check_labels(example: Text | Words, labels: Sequence[str]) -> None:
    """Refuses a label that training has not seen.

    Raises:
        UserError: Naming file, row and label.
    """
    for label in example_labels(example):
        if label not in labels:
            near = did_you_mean(label, labels)
            raise UserError(
                f"{example.where}: label {label!r} is unseen in training, which knows {_few(labels)}.{near}"
            )


def _label_names(task: TaskConfig, train: Sequence[Text | Words]) -> tuple[str, ...]:
    counts = Counter(label for example in train for label in example_labels(example))
    if not task.labels:
        if len(counts) < 2:
            raise UserError(
                f"data: the training rows have {len(counts)} label(s): {_few(list(counts))}; two are needed"
            )
        return tuple(sorted(counts))
    for label in task.labels:
        if not counts[label]:
            raise UserError(f"task.labels: {label!r} has no training row; take it out, or give it examples")
    for example in train:
        check_labels(example, task.labels)
    return task.labels


def strings(row: Row, name: str, option: str) -> tuple[str, ...]:
    """The values of a field that is a list of labels or words.

    Raises:
        UserError: The row has no such field, or it is no list of these.
    """
    values = field(row, name, option)
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{row.where}: field {name!r} is a {type(values).__name__}, must be a list")
    return tuple(label(value, row, name) for value in values)


def label(value: object, row: Row, name: str) -> str:
    """A label as text; numbers and truth values as JSON writes them.

    Raises:
        UserError: It is something else.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, (bool, int)):
        return json.dumps(value)
    raise UserError(f"{row.where}: field {name!r} holds {value!r}; must be text, a whole number, or true or false")


def _hash(example: Example) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps(example[0]).encode())


def _few(labels: Sequence[str]) -> str:
    shown = ", ".join(map(repr, labels[:8]))
    return shown if len(labels) <= 8 else f"{shown} and {len(labels) - 8} more"
