"""`gptjax predict`: labels for texts, as a stream of JSON objects."""

import dataclasses
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gptjax.checkpoints.run_dir import LoadedRun, load_run
from gptjax.config.run import DataConfig
from gptjax.config.task import LABELLED, TaskConfig
from gptjax.config.verbs import PredictConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import Predictions
from gptjax.files import publish, temporary_name
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.tasks.registry import parse
from gptjax.tasks.task import longest
from gptjax.text.counts import counted
from gptjax.text.formats import Row
from gptjax.text.rows import read_rows
from gptjax.verbs.evaluate import one_task, predict_labels

CHUNK = 1024
"""Rows in memory at a time."""
OUTPUTS = ("predicted", "probabilities", "cut")
"""Fields that are added to each row; a field of the input with one of these names becomes "input.NAME"."""


def run_predict(options: PredictConfig) -> int:
    """Labels texts, and prints how many where they are written to a file."""
    compile_cache.start()
    count = predict_run(options, notify)
    if options.out:
        print(f"{options.out}: {count:,} rows")
    return 0


def predict_run(options: PredictConfig, notify: Callable[[str], None] = print) -> int:
    """Writes each row with what the run predicts for it, in the order of the input; returns how many.

    `notify` gets one line for each of: damaged checkpoints, rows left out, texts that were cut, fields that got
    another name.

    Raises:
        UserError: The run predicts no labels, or a row is wrong.
    """
    run = load_run(Path(options.run_dir).expanduser(), options.checkpoint, options.strict, notify, options.base)
    run, name = one_task(run, options.part, options.run_dir)
    task = run.config.task
    if task.kind not in LABELLED:
        raise UserError(f"{options.run_dir}: has task.kind={task.kind} and names no labels; use gptjax sample")
    data = _data_config(run.config.data, options, task)
    counts: Counter[str] = Counter()
    rows = read_rows([options.file], "file", data, counts) if options.file else _given_rows(options.text, task, data)
    found = predicted_rows(run, name, rows, data, options.batch_size, counts)
    count = _write_file(found, Path(options.out).expanduser()) if options.out else _write(found, sys.stdout)
    for line in _notes(counts, count, longest(run.config)):
        notify(line)
    return count


def predicted_rows(
    run: LoadedRun, name: str, rows: Iterator[Row], data: DataConfig, batch_size: int, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yields the values of each row together with what head `name` predicts for it.

    Args:
        run: As one that learned a single task.
        name: Of the head.
        rows: Without labels, or with labels that are not read.
        data: Names the text field.
        batch_size: Texts at a time.
        counts: Gets "cut" and "renamed" (rows).

    Raises:
        UserError: A row is wrong.
    """
    while chunk := list(itertools.islice(rows, CHUNK)):
        examples = list(parse(chunk, run.config.task, data, labelled=False))
        predictions, _ = predict_labels(run, name, examples, min(batch_size, len(chunk)))
        values = _of_sentences(predictions) if run.config.task.kind == "tag" else _of_texts(predictions)
        for row, predicted, cut in zip(chunk, values, predictions.cut, strict=True):
            counts["cut"] += cut
            yield _renamed(row, counts) | predicted | {"cut": cut}


def _data_config(own: DataConfig, options: PredictConfig, task: TaskConfig) -> DataConfig:
    """How rows are read and normalised: as in training, but for what the options say of the file."""
    given = options.data
    if given.text_field and task.kind == "tag":
        raise UserError("data.text_field has no effect on a run with task.kind=tag; it reads task.tokens_field")
    file = {"path": (options.file or "unused",), "source": "", "hf_dataset": "", "streaming": False}
    reading = {"encoding": given.encoding, "quoting": given.quoting, "invalid_utf8": given.invalid_utf8}
    return dataclasses.replace(own, **file, **reading, text_field=given.text_field or own.text_field)


def _given_rows(texts: Iterable[str], task: TaskConfig, data: DataConfig) -> Iterator[Row]:
    for number, text in enumerate(texts, 1):
        values = {task.tokens_field: text.split()} if task.kind == "tag" else {data.text_field: text}
        yield Row(values, f"text {number}")


def _renamed(row: Row, counts: Counter[str]) -> dict[str, Any]:
    """The row's values, under names that the outputs do not have."""
    clash = [name for name in OUTPUTS if name in row.values]
    if not clash:
        return row.values
    if taken := next((name for name in clash if f"input.{name}" in row.values), None):
        raise UserError(
            f"{row.where}: has both {taken!r} and 'input.{taken}'; rename one, the output has {taken!r} too"
        )
    counts["renamed"] += 1
    return {f"input.{name}" if name in clash else name: value for name, value in row.values.items()}


def _notes(counts: Counter[str], count: int, max_tokens: int) -> list[str]:
    notes = counted(counts)
    if counts["cut"]:
        notes.append(f'{counts["cut"]:,} of {count:,} rows were cut at {max_tokens} tokens; they have "cut": true')
    if counts["renamed"]:
        names = " or ".join(OUTPUTS)
        notes.append(f'{counts["renamed"]:,} rows have a field named {names}; the output has it as "input.NAME"')
    return notes


def _write_file(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """Writes a file that is complete or not there."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            count = _write(rows, file)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write(rows: Iterable[dict[str, Any]], file: TextIO) -> int:
    count = 0
    for count, row in enumerate(rows, 1):
        file.write(json.dumps(_without_nan(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        if count % CHUNK == 0:
            file.flush()
    file.flush()
    return count


def _without_nan(value: Any) -> Any:
    """Nested plain values with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return {key: _without_nan(item) for key, item in value.items()} if isinstance(value, dict) else value


def _of_texts(predictions: Predictions) -> Iterator[dict[str, Any]]:
    labels = predictions.labels
    for probabilities, chosen in zip(predictions.probabilities_EN, predictions.chosen, strict=True):
        several = predictions.targets.ndim == 2
        name = [label for label, has in zip(labels, chosen, strict=True) if has] if several else labels[chosen]
        rounded = {label: round(p, 6) for label, p in zip(labels, probabilities.tolist(), strict=True)}
        yield {"predicted": name, "probabilities": rounded}


def _of_sentences(predictions: Predictions) -> Iterator[dict[str, Any]]:
    """A tag for each word and its probability; those of all other tags would be many times the text."""
    chosen, best = predictions.chosen.tolist(), predictions.probabilities_EN.max(axis=-1).tolist()
    for end, length in zip(np.cumsum(predictions.sentences).tolist(), predictions.sentences, strict=True):
        here = slice(end - length, end)
        names = [predictions.labels[n] for n in chosen[here]]
        yield {"predicted": names, "probabilities": [round(p, 6) for p in best[here]]}
