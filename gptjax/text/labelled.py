"""Rows → examples that name what is to be learned, checked; and which of them are held out."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import xxhash

from gptjax.config import DataConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.task_options import TaskConfig
from gptjax.text.rows import Row, field, limited, read_dataset_rows, read_rows, text_of


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


def read_examples(task: TaskConfig, data: DataConfig) -> Examples:
    """Reads and splits a task's rows, and finds the names of its labels.

    Raises:
        UserError: A row is wrong, a label has no training row, a validation row's label is unseen in training, or a
            side has no row; the message names file and row.
    """
    if not (data.path or data.hf_dataset):
        raise UserError("no rows: set one of data.path and data.hf_dataset")
    rows = read_dataset_rows(data) if data.hf_dataset else read_rows(data.path, "data.path")
    examples = list(parse(limited(rows, data), task, data))
    if task.validation_path:
        train, validation = examples, list(parse(read_rows(task.validation_path, "task.validation_path"), task, data))
    else:
        held_out = [_hash(example) < data.validation_fraction * 2**64 for example in examples]
        train = [example for example, held in zip(examples, held_out, strict=True) if not held]
        validation = [example for example, held in zip(examples, held_out, strict=True) if held]
    if not train or not validation:
        raise UserError(
            f"data: {len(train)} rows to train on and {len(validation)} to validate on; give more rows,"
            " or task.validation_path, or another data.validation_fraction"
        )
    if task.kind == "instruct":
        return Examples(train, validation, (), False)
    labels = _label_names(task, train)
    for example in validation:
        check_labels(example, labels)
    several = task.multi_label or any(isinstance(e, Text) and len(e.labels) != 1 for e in (*train, *validation))
    return Examples(train, validation, labels, several)


def parse(rows: Iterable[Row], task: TaskConfig, data: DataConfig, labelled: bool = True) -> Iterator[Any]:
    """Turns rows into the task's examples.

    Args:
        rows: As read.
        task: Names the fields.
        data: Names the text field.
        labelled: Whether a row must have its label; if not, none is read.

    Raises:
        UserError: A field is missing, empty or of another type.
    """
    one = {"classify": _text, "tag": _words, "instruct": _chat}[task.kind]
    return (one(row, task, data, labelled) for row in rows)


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


def _text(row: Row, task: TaskConfig, data: DataConfig, labelled: bool) -> Text:
    text = text_of(row, data.text_field)
    if not labelled:
        return Text(text, (), row.where)
    value = field(row, task.label_field, "task.label_field")
    several = isinstance(value, (list, tuple))
    labels = tuple(_label(item, row, task.label_field) for item in (value if several else [value]))
    if len(set(labels)) < len(labels):
        raise UserError(f"{row.where}: field {task.label_field!r} names a label twice")
    return Text(text, labels, row.where)


def _words(row: Row, task: TaskConfig, data: DataConfig, labelled: bool) -> Words:
    words = _strings(row, task.tokens_field, "task.tokens_field")
    if not words or not all(word.strip() for word in words):
        raise UserError(f"{row.where}: field {task.tokens_field!r} has no word, or an empty one")
    if not labelled:
        return Words(words, (), row.where)
    tags = _strings(row, task.tags_field, "task.tags_field")
    if len(tags) != len(words):
        raise UserError(f"{row.where}: {len(words)} words in {task.tokens_field!r}, {len(tags)} in {task.tags_field!r}")
    return Words(words, tags, row.where)


def _strings(row: Row, name: str, option: str) -> tuple[str, ...]:
    values = field(row, name, option)
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{row.where}: field {name!r} is a {type(values).__name__}, must be a list")
    return tuple(_label(value, row, name) for value in values)


def _label(value: object, row: Row, name: str) -> str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, (bool, int)):
        return json.dumps(value)
    raise UserError(f"{row.where}: field {name!r} holds {value!r}; must be text, a whole number, or true or false")


def _chat(row: Row, task: TaskConfig, data: DataConfig, labelled: bool) -> Chat:
    if task.messages_field in row.values:
        messages = field(row, task.messages_field, "task.messages_field")
        if not isinstance(messages, (list, tuple)) or not all(isinstance(m, dict) for m in messages):
            raise UserError(f"{row.where}: field {task.messages_field!r} must be a list of {{role, content}}")
    else:
        prompt = field(row, task.prompt_field, "task.prompt_field")
        response = field(row, task.response_field, "task.response_field")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    before, after = task.template.split("{content}")
    pieces: list[tuple[str, bool]] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
            raise UserError(f"{row.where}: a message needs a role and a content that is not empty, not {message!r}")
        learned = role == "assistant"
        pieces += [(before.replace("{role}", role), False), (content + after.replace("{role}", role), learned)]
    if not any(learned for _, learned in pieces):
        raise UserError(f"{row.where}: no message of role assistant, so there is nothing to learn")
    return Chat(tuple(pieces), row.where)


def _hash(example: Example) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps(example[0]).encode())


def _few(labels: Sequence[str]) -> str:
    shown = ", ".join(map(repr, labels[:8]))
    return shown if len(labels) <= 8 else f"{shown} and {len(labels) - 8} more"
