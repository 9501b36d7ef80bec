"""`gptjax predict`: predicts labels or writes texts for rows, as JSON lines."""

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
from gptjax.text.chats import USER, Message, render_prompt
from gptjax.text.counts import counted
from gptjax.text.formats import Row
from gptjax.text.rows import normalised, read_rows, text_field
from gptjax.verbs.evaluate import one_task, predict_labels
from gptjax.verbs.generated import GENERATING, write_responses, write_targets
from gptjax.verbs.output_rows import renamed, write_file, write_rows

CHUNK = 1024
"""Number of rows in memory at a time."""
NEW_TOKENS = 64
"""Tokens that are written for a row at most, by default."""
OUTPUTS = ("predicted", "probabilities", "cut")
"""Fields that are added to each row; an input field with one of these names is renamed to "input.NAME"."""


def run_predict(options: PredictConfig) -> int:
    """Predicts; if the output is a file, prints the number of rows."""
    compile_cache.start()
    count = predict_run(options, notify)
    if options.out:
        print(f"{options.out}: {count:,} rows")
    return 0


def predict_run(options: PredictConfig, notify: Callable[[str], None] = print) -> int:
    """Writes each row with its predictions, in input order; returns the number of rows.

    `notify` is called with one line about damaged checkpoints, skipped rows, truncated texts and renamed fields.

    Raises:
        UserError: The run predicts nothing for rows, or a row is invalid.
    """
    run = load_run(Path(options.run_dir).expanduser(), options.checkpoint, options.strict, notify, options.base)
    run, name = one_task(run, options.part, options.run_dir)
    task = run.config.task
    writes = task.kind in GENERATING
    if TASKS[task.kind].predict is None and not writes:
        raise UserError(f"{options.run_dir}: has task.kind={task.kind}, which has no labels; use gptjax sample")
    for option in ("max_new_tokens", "output_field"):
        if getattr(options, option) and not writes:
            raise UserError(
                f"{option}={getattr(options, option)!r} has no effect: task.kind={task.kind} writes no text"
            )
    data = _data_config(run.config.data, options, task)
    counts: Counter[str] = Counter()
    if writes:
        field = options.data.text_field or (task.source_field if task.kind == "seq2seq" else task.prompt_field)
        data = dataclasses.replace(data, text_field=field)
    rows = read_rows([options.file], "file", data, counts) if options.file else _given_rows(options.text, task, data)
    first = list(itertools.islice(rows, 1))
    if not first and not any(counts.values()):
        raise UserError(f"{options.file}: has no rows")
    rows = itertools.chain(first, rows)
    if writes:
        found = written_rows(run, rows, data, options, counts, notify)
    else:
        found = predicted_rows(run, name, rows, data, options.batch_size, counts)
    count = write_file(found, Path(options.out).expanduser()) if options.out else write_rows(found, sys.stdout)
    names = (options.output_field or OUTPUTS[0],) if writes else OUTPUTS
    for line in _notes(counts, count, longest(run.config), names):
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
        assert outputs is not None  # every task with `predict` has it
        for row, predicted, cut in zip(chunk, outputs(predictions), predictions.cut, strict=True):
            counts["cut"] += cut
            values = {name: _rounded(value) for name, value in predicted.items()}
            yield renamed(row, (*OUTPUTS, *values), counts) | values | {"cut": cut}


def written_rows(
    run: LoadedRun,
    rows: Iterator[Row],
    data: DataConfig,
    options: PredictConfig,
    counts: Counter[str],
    notify: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Yields the values of each row together with the text that a run of instruct or seq2seq writes for it.

    Raises:
        UserError: A row has no text in `data.text_field`.
    """
    task, tokenizer, name = run.config.task, run.tokenizer, options.output_field or OUTPUTS[0]
    assert tokenizer is not None  # training refuses a run without one
    while chunk := list(itertools.islice(rows, CHUNK)):
        texts = [text_field(normalised(row, data), data.text_field) for row in chunk]
        sizes = options.max_new_tokens or NEW_TOKENS, min(options.batch_size, len(chunk))
        if task.kind == "seq2seq":
            written = write_targets(run, tokenizer, texts, *sizes, notify)
        else:
            prompts = [render_prompt([Message(USER, text)], task.template) for text in texts]
            written = write_responses(run, tokenizer, prompts, *sizes, notify)
        for row, text in zip(chunk, written, strict=True):
            yield renamed(row, (name,), counts) | {name: text.strip()}


def _data_config(own: DataConfig, options: PredictConfig, task: TaskConfig) -> DataConfig:
    """Reading and normalisation as in training, except the options of the input file."""
    given = options.data
    if given.text_field and task.kind == "tag":
        raise UserError("data.text_field has no effect on a run with task.kind=tag; it reads task.tokens_field")
    file = {"path": (options.file or "unused",), "source": "", "hf_dataset": "", "streaming": False}
    reading = {"encoding": given.encoding, "quoting": given.quoting, "invalid_utf8": given.invalid_utf8}
    return dataclasses.replace(own, **file, **reading, text_field=given.text_field or own.text_field)


def _given_rows(texts: Iterable[str], task: TaskConfig, data: DataConfig) -> Iterator[Row]:
    if task.second_field or task.kind not in ("classify", "regress", "tag", *GENERATING):
        raise UserError(f"text: a row of this run (task.kind={task.kind}) is more than a text; give --file FILE")
    for number, text in enumerate(texts, 1):
        values = {task.tokens_field: text.split()} if task.kind == "tag" else {data.text_field: text}
        yield Row(values, f"text {number}")


def _notes(counts: Counter[str], count: int, max_tokens: int, outputs: tuple[str, ...]) -> list[str]:
    notes = counted(counts)
    if counts["cut"]:
        notes.append(f'{counts["cut"]:,} of {count:,} rows were cut at {max_tokens} tokens; they have "cut": true')
    if counts["renamed"]:
        names = " or ".join(outputs)
        notes.append(f'{counts["renamed"]:,} rows have a field named {names}; the output has it as "input.NAME"')
    return notes


def _rounded(value: Any) -> Any:
    """Rounds probabilities in lists and dicts to six digits; other values are unchanged."""
    if isinstance(value, list):
        return [round(p, 6) if isinstance(p, float) else p for p in value]
    return {label: round(p, 6) for label, p in value.items()} if isinstance(value, dict) else value
