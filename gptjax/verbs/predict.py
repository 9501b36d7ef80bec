"""Labels for texts of one's own, as many as there are."""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from gptjax.checkpoints.run_dir import LoadedRun, load_run
from gptjax.config.task import LABELLED
from gptjax.config.verbs import PredictConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import Predictions
from gptjax.files import publish, temporary_name
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.tasks.registry import parse
from gptjax.text.rows import Row, read_rows
from gptjax.verbs.evaluate import one_task, predict_labels

CHUNK = 1024  # rows in memory at a time


def run_predict(options: PredictConfig) -> int:
    """Labels texts, and prints how many where they are written to a file."""
    compile_cache.start()
    count = predict_run(options, notify)
    if options.out:
        print(f"{options.out}: {count:,} rows")
    return 0


def predict_run(options: PredictConfig, notify: Callable[[str], None] = print) -> int:
    """Writes each row with what the run predicts for it, in the order of the input; returns how many.

    `notify` is told of damaged checkpoints in one line.

    Raises:
        UserError: The run names no labels, or a row is wrong.
    """
    run = load_run(Path(options.run_dir).expanduser(), options.checkpoint, options.strict, notify, options.base)
    run, name = one_task(run, options.part, options.run_dir)
    task, data = run.config.task, run.config.data
    if task.kind not in LABELLED:
        raise UserError(f"{options.run_dir}: has task.kind={task.kind} and names no labels; use gptjax sample")
    if options.file:
        rows = read_rows([options.file], "file")
    elif task.kind == "tag":
        rows = (Row({task.tokens_field: text.split()}, f"text {n}") for n, text in enumerate(options.text, 1))
    else:
        rows = (Row({data.text_field: text}, f"text {n}") for n, text in enumerate(options.text, 1))
    if not options.out:
        return _write(run, name, rows, options.batch_size, sys.stdout)
    out = Path(options.out).expanduser()
    temporary = temporary_name(out)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            count = _write(run, name, rows, options.batch_size, file)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write(run: LoadedRun, name: str, rows: Iterator[Row], batch_size: int, file: TextIO) -> int:
    count = 0
    while chunk := list(itertools.islice(rows, CHUNK)):
        for row, predicted in zip(chunk, _predicted(run, name, chunk, batch_size), strict=True):
            file.write(json.dumps(row.values | predicted, ensure_ascii=False, default=str) + "\n")
        file.flush()
        count += len(chunk)
    return count


def _predicted(run: LoadedRun, name: str, rows: list[Row], batch_size: int) -> Iterator[dict]:
    task = run.config.task
    examples = list(parse(rows, task, run.config.data, labelled=False))
    predictions, _ = predict_labels(run, name, examples, min(batch_size, len(rows)))
    if task.kind == "classify":
        return _of_texts(predictions)
    ends = np.cumsum(predictions.sentences)
    return (_of_words(predictions, slice(end - n, end)) for end, n in zip(ends, predictions.sentences, strict=True))


def _of_texts(predictions: Predictions) -> Iterator[dict]:
    labels = predictions.labels
    for probabilities, chosen in zip(predictions.probabilities_EN, predictions.chosen, strict=True):
        several = predictions.targets.ndim == 2
        name = [label for label, has in zip(labels, chosen, strict=True) if has] if several else labels[chosen]
        yield {"predicted": name, "probabilities": _rounded(dict(zip(labels, probabilities.tolist(), strict=True)))}


def _of_words(predictions: Predictions, here: slice) -> dict:
    """A tag for each word and its probability; those of all other tags would be many times the text."""
    chosen = predictions.chosen[here].tolist()
    best = predictions.probabilities_EN[here].max(axis=-1).tolist()
    return {"predicted": [predictions.labels[n] for n in chosen], "probabilities": [round(p, 6) for p in best]}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}
