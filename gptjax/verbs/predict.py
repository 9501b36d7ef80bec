"""`gptjax predict`: predicts labels of texts, and writes them as JSON lines."""

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gptjax.checkpoints.run_dir import LoadedRun, load_run
from gptjax.config.data import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.config.verbs.predict import PredictConfig
from gptjax.errors import UserError
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.tasks.registry import TASKS, parse
from gptjax.tasks.task import longest
from gptjax.text.counts import counted
from gptjax.text.formats import Row
from gptjax.text.rows import read_rows
from gptjax.verbs.evaluate import one_task, predict_labels
from gptjax.verbs.output_rows import renamed, write_file, write_rows

CHUNK = 1024
"""Number of rows in memory at a time."""
OUTPUTS = ("predicted", "probabilities", "cut")
"""Fields that are added to each row; an input field with one of these names is renamed to "input.NAME"."""


def run_predict(options: PredictConfig) -> int:
    """Predicts labels; if the output is a file, prints the number of rows."""
    compile_cache.start()
    count = predict_run(options, notify)
    if options.out:
        print(f"{options.out}: {count:,} rows")
    return 0


def predict_run(options: PredictConfig, notify: Callable[[str], None] = print) -> int:
    """Writes each row with its predictions, in input order; returns the number of rows.

    `notify` is called with one line about damaged checkpoints, skipped rows, truncated texts and renamed fields.

    Raises:
        UserError: The run predicts no labels, or a row is invalid.
    """
    run = load_run(Path(options.run_dir).expanduser(), options.checkpoint, options.strict, notify, options.base)
    run, name = one_task(run, options.part, options.run_dir)
    task = run.config.task
    if TASKS[task.kind].predict is None:
        raise UserError(f"{options.run_dir}: has task.kind={task.kind}, which has no labels; use gptjax sample")
    data = _data_config(run.config.data, options, task)
    counts: Counter[str] = Counter()
    rows = read_rows([options.file], "file", data, counts) if options.file else _given_rows(options.text, task, data)
    found = predicted_rows(run, name, rows, data, options.batch_size, counts)
    count = write_file(found, Path(options.out).expanduser()) if options.out else write_rows(found, sys.stdout)
    for line in _notes(counts, count, longest(run.config)):
        notify(line)
    return count


def predicted_rows(
    run: LoadedRun, name: str, rows: Iterator[Row], data: DataConfig, batch_size: int, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yields the values of each row together with the predictions of head `name`.

    Args:
        run: A run restricted to a single task (`one_task`).
        name: Name of the head.
        rows: Rows; their labels are not read.
        data: Names the text field.
        batch_size: Number of texts in a batch.
        counts: Its entries "cut" and "renamed" are increased for each such row.

    Raises:
        UserError: A row is invalid.
    """
    while chunk := list(itertools.islice(rows, CHUNK)):
        examples = list(parse(chunk, run.config.task, data, labelled=False))
        predictions, _ = predict_labels(run, name, examples, min(batch_size, len(chunk)))
        outputs = TASKS[run.config.task.kind].outputs
        assert outputs is not None  # as there is a function that predicts
        for row, predicted, cut in zip(chunk, outputs(predictions), predictions.cut, strict=True):
            counts["cut"] += cut
            values = {name: _rounded(value) for name, value in predicted.items()}
            yield renamed(row, OUTPUTS, counts) | values | {"cut": cut}


def _data_config(own: DataConfig, options: PredictConfig, task: TaskConfig) -> DataConfig:
    """Reading and normalisation as in training, except the options of the input file."""
    given = options.data
    if given.text_field and task.kind == "tag":
        raise UserError("data.text_field has no effect on a run with task.kind=tag; it reads task.tokens_field")
    file = {"path": (options.file or "unused",), "source": "", "hf_dataset": "", "streaming": False}
    reading = {"encoding": given.encoding, "quoting": given.quoting, "invalid_utf8": given.invalid_utf8}
    return dataclasses.replace(own, **file, **reading, text_field=given.text_field or own.text_field)


def _given_rows(texts: Iterable[str], task: TaskConfig, data: DataConfig) -> Iterator[Row]:
    if task.second_field or task.kind not in ("classify", "regress", "tag"):
        raise UserError(f"text: a row of this run (task.kind={task.kind}) is more than a text; give --file FILE")
    for number, text in enumerate(texts, 1):
        values = {task.tokens_field: text.split()} if task.kind == "tag" else {data.text_field: text}
        yield Row(values, f"text {number}")


def _notes(counts: Counter[str], count: int, max_tokens: int) -> list[str]:
    notes = counted(counts)
    if counts["cut"]:
        notes.append(f'{counts["cut"]:,} of {count:,} rows were cut at {max_tokens} tokens; they have "cut": true')
    if counts["renamed"]:
        names = " or ".join(OUTPUTS)
        notes.append(f'{counts["renamed"]:,} rows have a field named {names}; the output has it as "input.NAME"')
    return notes


def _rounded(value: Any) -> Any:
    """Probabilities in lists and by label, to six digits; other values as they are."""
    if isinstance(value, list):
        return [round(p, 6) if isinstance(p, float) else p for p in value]
    return {label: round(p, 6) for label, p in value.items()} if isinstance(value, dict) else value
