"""The table of tasks, and the functions that build a run's data, loss and evaluation from it."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import LABELLED, TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import are_spans, require_seqeval
from gptjax.model.gpt import Compute
from gptjax.model.loss import extra_weights
from gptjax.ops.cross_entropy import Loss, with_extras
from gptjax.report.progress import say
from gptjax.tasks import answer, choose, classify, dpo, instruct, pretrain, regress, reinforce, reward, seq2seq, tag
from gptjax.tasks.functions import call_function
from gptjax.tasks.heads import states_of
from gptjax.tasks.multi import combine, combined_loss, parts_of, with_shared_heads
from gptjax.tasks.task import Compile, Kind, LossFunction, Source, StatesLoss, Task
from gptjax.text import labelled as labelled_rows
from gptjax.text.documents import read_skipped
from gptjax.text.formats import Row
from gptjax.text.labelled import Examples, ParseRow
from gptjax.text.mixture import prepare_sources
from gptjax.text.prepare import Prepared, prepare
from gptjax.text.tokenizer import make_tokenizer
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.text.tokenizers.extended import with_special_tokens

TASKS: dict[str, Kind] = {
    "pretrain": pretrain.KIND,
    "classify": classify.KIND,
    "regress": regress.KIND,
    "choose": choose.KIND,
    "tag": tag.KIND,
    "answer": answer.KIND,
    "instruct": instruct.KIND,
    "reward": reward.KIND,
    "dpo": dpo.KIND,
    "reinforce": reinforce.KIND,
    "seq2seq": seq2seq.KIND,
}
"""The functions of each `task.kind`. `multi` combines several of them."""


def read_source(config: Config, tokenizer: Tokenizer | None) -> Source:
    """Reads a run's text or examples, and trains its tokenizer if none is given.

    Raises:
        UserError: The data cannot be read or is invalid.
    """
    if config.task.kind == "pretrain":
        cache = Path(config.cache_dir).expanduser()
        if config.sources:
            sources = {source.name: source.data for source in config.sources}
            mixed = prepare_sources(sources, config.tokenizer, cache, report=say, tokenizer_override=tokenizer)
            first = next(iter(mixed.values()))
            skipped = {name: _skipped(one, sources[name], f"{name}: ") for name, one in mixed.items()}
            return Source(
                first.tokenizer, None, {}, mixture={n: one.dataset for n, one in mixed.items()}, skipped=skipped
            )
        prepared = prepare(config.data, config.tokenizer, cache, report=say, tokenizer_override=tokenizer)
        tokenizer = with_special_tokens(prepared.tokenizer, config.task.objective.special_tokens)
        return Source(tokenizer, prepared.dataset, {}, skipped={"": _skipped(prepared, config.data)})
    parts, texts, skipped = parts_of(config), {}, {}
    for name, part in list(parts.items()):
        if part.task.kind == "pretrain":
            cache = Path(config.cache_dir).expanduser()
            prepared = prepare(part.data, config.tokenizer, cache, report=say, tokenizer_override=tokenizer)
            # The first text makes the tokenizer of all parts, where no run is named to start from.
            tokenizer, texts[name] = prepared.tokenizer, prepared.dataset
            skipped[name] = _skipped(prepared, part.data, f"{name}: ")
            del parts[name]
    examples = {name: read_examples(part.task, part.data) for name, part in parts.items()}
    if any(part.task.kind == "tag" and are_spans(examples[name].labels) for name, part in parts.items()):
        require_seqeval()
    if tokenizer is None:
        plain = {name: TASKS[part.task.kind].plain_text for name, part in parts.items()}
        tokenizer = make_tokenizer(
            config.tokenizer, lambda: (plain[name](e) for name, part in examples.items() for e in part.train)
        )
    return Source(tokenizer, None, examples, texts, skipped=skipped)


def _skipped(prepared: Prepared, data: DataConfig, name: str = "") -> frozenset[int]:
    if not data.skip:
        return frozenset()
    numbers, line = read_skipped(prepared.folder, data.skip)
    say(f"skipped     {name}{line}")
    return numbers


def read_examples(task: TaskConfig, data: DataConfig) -> Examples:
    """Reads and splits a task's rows, see `text.labelled.read_examples`."""
    return labelled_rows.read_examples(_row_parser(task), task, data)


def parse(
    rows: Iterable[Row],
    task: TaskConfig,
    data: DataConfig,
    labelled: bool = True,
    counts: Counter[str] | None = None,
) -> Iterator[Any]:
    """Turns rows into the task's examples, see `text.labelled.parse_rows`."""
    return labelled_rows.parse_rows(_row_parser(task), rows, task, data, labelled, counts)


def _row_parser(task: TaskConfig) -> ParseRow:
    """The task's function that parses a row, applied after the user's function of `task.rows`."""
    parse_row = TASKS[task.kind].parse_row
    assert parse_row is not None
    if not task.rows:
        return parse_row

    def parse_changed(row: Row, task: TaskConfig, data: DataConfig, labelled: bool, counts: Counter[str]) -> Any:
        values = call_function(task.rows, "task.rows", dict(row.values), where=row.where)
        if values is None:
            counts["left_out_by_function"] += 1
            return None
        if not isinstance(values, dict):
            raise UserError(
                f"{row.where}: task.rows={task.rows!r} returned a {type(values).__name__}; must return a dict, or None"
                " to leave the row out"
            )
        return parse_row(Row(values, row.where), task, data, labelled, counts)

    return parse_changed


def with_labels(config: Config, examples: dict[str, Examples]) -> Config:
    """Adds to the config the labels found in the data, and the mean and deviation of regression targets."""

    def filled(task: TaskConfig, name: str) -> TaskConfig:
        if task.kind == "regress":
            return regress.with_moments(task, examples[name])
        if task.kind not in LABELLED:
            return task
        found = examples[name]
        return dataclasses.replace(task, labels=found.labels, multi_label=found.multi_label)

    if config.task.kind == "multi":
        parts = (dataclasses.replace(part, task=filled(part.task, part.name)) for part in config.parts)
        for part in config.parts:
            if not part.head:
                continue
            found, known = (examples[name].labels for name in (part.name, part.head))
            if found != known:
                raise UserError(
                    f"parts: {part.name}: its labels {', '.join(found)} must be {', '.join(known)}, as of"
                    f" head={part.head!r}"
                )
        return dataclasses.replace(config, parts=tuple(parts))
    return dataclasses.replace(config, task=filled(config.task, config.task.kind))


def make_loss(config: Config, compute: Compute) -> LossFunction:
    """Returns `loss(params, batch, key)`, summed over the batch."""
    losses = {name: make_part_loss(part, name, compute) for name, part in parts_of(config).items()}
    if config.task.kind != "multi":
        return losses[config.task.kind]
    combined = combined_loss(losses)
    return lambda params, batch, key: combined(with_shared_heads(config, params), batch, key)


def make_part_loss(config: Config, name: str, compute: Compute) -> LossFunction:
    """Returns the loss of one task, which uses the head `name`."""
    of_states, model = make_states_loss(config, name), config.model

    def loss(params: dict, batch: Any, key: jax.Array | None) -> Loss:
        x_BTD, extras = states_of(model, config.task, params, name, batch, compute, key)
        found = of_states(params, x_BTD, batch)
        return with_extras(found, extras, extra_weights(model)) if extras else found

    return loss


def make_states_loss(config: Config, name: str) -> StatesLoss:
    """Returns the loss of one task as a function of parameters, final hidden states, and the batch."""
    return TASKS[config.task.kind].states_loss(config, name)


def make_task(config: Config, source: Source, compute: Compute, compiled: Compile) -> Task:
    """Builds the batches and the evaluation of a run.

    Args:
        config: With resolved vocabulary size and labels.
        source: Result of `read_source`.
        compute: How the forward pass is computed.
        compiled: Compiles a function of parameters and a batch.
    """
    tasks = {
        name: TASKS[part.task.kind].build(part, name, source, compute, compiled)
        for name, part in parts_of(config).items()
    }
    if config.task.kind != "multi":
        return tasks[config.task.kind]
    task = combine({part.name: part.weight for part in config.parts}, tasks)
    combined_evaluate = task.evaluate
    return dataclasses.replace(
        task, evaluate=lambda params, sharding: combined_evaluate(with_shared_heads(config, params), sharding)
    )
