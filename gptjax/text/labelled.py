"""Parses rows to examples of a task, checks them, and splits them into training and validation examples."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import xxhash

from gptjax.config.data import DataConfig
from gptjax.config.task import LABELLED, TaskConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.text.chats import Chat
from gptjax.text.counts import counted
from gptjax.text.formats import Row
from gptjax.text.rows import (
    MISSING_NUMBERS,
    field_value,
    limited,
    normalised,
    read_dataset_rows,
    read_rows,
    text_field,
)

_NOT_A_NUMBER = ("nan", "<na>")  # as pandas writes them
PLACEHOLDERS = ("-", "?", "n/a", "#n/a", "null")
"""Labels that mean "not known" in public datasets, such as "-" in SNLI, where there are two other labels or more."""


class Text(NamedTuple):
    """A text or a pair for `classify`. `labels` is empty if unknown; it has several labels only with `multi_label`."""

    text: str
    labels: tuple[str, ...]
    where: str
    listed: bool = False
    """Whether the labels were given as a list."""
    second: str | None = None
    """The second text of a pair."""


class Numbers(NamedTuple):
    """A text or a pair for `regress`; `values` is empty if unknown."""

    text: str
    values: tuple[float, ...]
    where: str
    second: str | None = None
    """The second text of a pair."""


class Choice(NamedTuple):
    """A text for `choose` and its candidates; `answer` is the number of the correct one from 0, or -1 if unknown."""

    text: str
    candidates: tuple[str, ...]
    answer: int
    where: str


class Words(NamedTuple):
    """A sentence for `tag`; `tags` is empty if unknown."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    where: str


class Preference(NamedTuple):
    """A prompt for `reward` or `dpo` with two responses, each as a chat; `rejected` is None for a response to score."""

    text: str
    """The prompt."""
    chosen: Chat
    rejected: Chat | None
    where: str


Example = Preference | Text | Numbers | Choice | Words | Chat


class Examples(NamedTuple):
    """Training and validation examples of a run."""

    train: list
    validation: list
    labels: tuple[str, ...]
    multi_label: bool
    notes: tuple[str, ...] = ()
    """Log lines about rows that were left out or changed."""


ParseRow = Callable[[Row, TaskConfig, DataConfig, bool, Counter[str]], Any]
"""Parses a row to an example, or returns None and counts the row if it is left out. The fourth argument says whether
the row must have its label; otherwise the label is not read."""


def read_examples(parse_row: ParseRow, task: TaskConfig, data: DataConfig) -> Examples:
    """Reads and splits a task's rows, and finds the names of its labels.

    Raises:
        UserError: A row is invalid, a label has no training row, a validation text has a label that is not in the
            training rows, or one of the splits is empty; the message names file and row.
    """
    if not (data.path or data.hf_dataset):
        raise UserError("no rows: set one of data.path and data.hf_dataset")
    counts: Counter[str] = Counter()
    examples = list(parse_rows(parse_row, limited(read_data_rows(data, counts), data), task, data, counts=counts))
    placeholders = () if task.labels else _placeholders(examples)
    examples = _without_labels(examples, placeholders, counts)
    if task.validation_path:
        rows = read_rows(task.validation_path, "task.validation_path", data, counts)
        validation = list(parse_rows(parse_row, rows, task, data, counts=counts))
        train, validation = examples, _without_labels(validation, placeholders, counts)
    else:
        held_out = [_is_held_out(hash_text(example), task, data) for example in examples]
        train = [example for example, held in zip(examples, held_out, strict=True) if not held]
        validation = [example for example, held in zip(examples, held_out, strict=True) if held]
    notes = tuple(counted(counts))
    if not train or not validation:
        raise UserError(
            f"data: {len(train)} rows to train on and {len(validation)} to validate on; give more rows,"
            f" or task.validation_path, or another data.validation_fraction{_in_brackets(notes)}"
        )
    if task.kind not in LABELLED:
        return Examples(train, validation, (), False, notes)
    labels = _label_names(task, train, notes)
    for example in validation:
        check_labels(example, labels, counts)
    notes = tuple(counted(counts))
    listed = any(isinstance(example, Text) and example.listed for example in (*train, *validation))
    return Examples(train, validation, labels, task.multi_label or listed, notes)


def read_data_rows(data: DataConfig, counts: Counter[str]) -> Iterator[Row]:
    """The rows of `data.hf_dataset` or `data.path`."""
    return read_dataset_rows(data, counts) if data.hf_dataset else read_rows(data.path, "data.path", data, counts)


def parse_rows(
    parse_row: ParseRow,
    rows: Iterable[Row],
    task: TaskConfig,
    data: DataConfig,
    labelled: bool = True,
    counts: Counter[str] | None = None,
) -> Iterator[Any]:
    """Turns rows into examples.

    Args:
        parse_row: Parses a row to an example.
        rows: The rows.
        task: Names of the fields.
        data: Name of the text field, and options of normalisation.
        labelled: Whether a row must have its label; otherwise the label is not read.
        counts: Incremented for each row that is left out.

    Raises:
        UserError: A field is missing, empty or of another type.
    """
    counts = Counter() if counts is None else counts
    for row in rows:
        example = parse_row(normalised(row, data), task, data, labelled, counts)
        if example is not None:
            yield example


def example_labels(example: Text | Words) -> tuple[str, ...]:
    """The labels of an example."""
    return example.labels if isinstance(example, Text) else example.tags


def check_labels(example: Text | Words, labels: Sequence[str], counts: Counter[str] | None = None) -> None:
    """Checks that the labels of an example occur in training. Tags of words that do not are counted in `counts`, if it
    is given.

    Raises:
        UserError: A label does not; the message names file, row and label.
    """
    for label in example_labels(example):
        if label not in labels:
            if isinstance(example, Words) and counts is not None:
                counts["unseen_tag"] += 1
                continue
            near = did_you_mean(label, labels)
            raise UserError(
                f"{example.where}: label {label!r} is unseen in training, which knows {_enumerated(labels)}.{near}"
            )


def hash_text(example: Example) -> int:
    """The hash that decides the split of an example: equal texts are in the same split, whatever their labels."""
    return xxhash.xxh3_64_intdigest(json.dumps(example[0]).encode())


def _is_held_out(number: int, task: TaskConfig, data: DataConfig) -> bool:
    """Whether an example with this hash belongs to the validation split."""
    return number % task.folds == task.fold if task.folds else number < data.validation_fraction * 2**64


def _label_names(task: TaskConfig, train: Sequence[Text | Words], notes: Sequence[str]) -> tuple[str, ...]:
    counts = Counter(label for example in train for label in example_labels(example))
    if not task.labels:
        if len(counts) < 2:
            raise UserError(
                f"data: the training rows have {len(counts)} label(s): {_enumerated(list(counts))}; two are"
                f" needed{_in_brackets(notes)}"
            )
        return tuple(sorted(counts))
    for label in task.labels:
        if not counts[label]:
            raise UserError(f"task.labels: {label!r} has no training row; take it out, or give it examples")
    for example in train:
        check_labels(example, task.labels)
    return task.labels


def text_and_second(row: Row, task: TaskConfig, data: DataConfig) -> tuple[str, str | None]:
    """The text of a row, and the second one if `task.second_field` is set.

    Raises:
        UserError: One of them is missing or empty.
    """
    text = text_field(row, data.text_field)
    return text, text_field(row, task.second_field, "task.second_field") if task.second_field else None


def string_list(row: Row, name: str, option: str) -> tuple[Any, ...]:
    """The values of a field that is a list of labels or words.

    Raises:
        UserError: The row has no such field, or it is no list.
    """
    values = field_value(row, name, option)
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{row.where}: field {name!r} is a {type(values).__name__}, must be a list")
    return tuple(values)


def label_name(value: object, row: Row, name: str) -> str:
    """A label as text; numbers and booleans are formatted as in JSON.

    Raises:
        UserError: The value has another type.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, float) and value.is_integer():  # parquet columns with nulls store integers as floats
        return json.dumps(int(value))
    if isinstance(value, (bool, int)):
        return json.dumps(value)
    raise UserError(f"{row.where}: field {name!r} holds {value!r}; must be text, a whole number, or true or false")


def is_missing(value: object, classes: Sequence[str]) -> bool:
    """Whether a value means "no label", as in public datasets: null, NaN, empty, -1 or -100.

    Args:
        value: The label as it was read; in CSV, numbers and NaN are text.
        classes: Names of labels from the user; a value among them is a label.
    """
    if value is None:
        return True
    name = str(value).strip()
    if not name or name.lower() in _NOT_A_NUMBER:
        return name not in classes
    try:
        number = float(name)
    except ValueError:
        return False
    return number in MISSING_NUMBERS and name not in classes and str(int(number)) not in classes


def is_placeholder(label: str, classes: Sequence[str]) -> bool:
    """Whether a label is one of `PLACEHOLDERS` and not among the names of classes."""
    return label.strip().lower() in PLACEHOLDERS and label not in classes


def _placeholders(examples: Sequence[Example]) -> Sequence[str]:
    """The labels of `classify` that mean "not known"; "-" beside "+" is a class."""
    names = {label for example in examples if isinstance(example, Text) for label in example.labels}
    found = [name for name in names if is_placeholder(name, ())]
    return () if "+" in names or len(names) - len(found) < 2 else found


def _without_labels(examples: list, names: Sequence[str], counts: Counter[str]) -> list:
    """Examples that have none of these labels."""
    if not names:
        return examples
    kept = [example for example in examples if not set(names).intersection(example.labels)]
    counts["placeholder_label"] += len(examples) - len(kept)
    return kept


def _in_brackets(notes: Sequence[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def _enumerated(labels: Sequence[str]) -> str:
    shown = ", ".join(map(repr, labels[:8]))
    return shown if len(labels) <= 8 else f"{shown} and {len(labels) - 8} more"
