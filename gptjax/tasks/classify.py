"""Text classification, with one or several labels per text."""

import functools
from collections import Counter
from collections.abc import Sequence

import jax

from gptjax.batches.labelled import TextBatches, encode_texts
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config, DataConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import LabelScores, Predictions, score
from gptjax.evaluation.predict import Predict, make_predict, predict_texts
from gptjax.model.gpt import Compute
from gptjax.model.loss import label_batch_loss, state_logits
from gptjax.tasks.task import Compile, Kind, Source, StatesLoss, Task, hash_arrays, longest
from gptjax.text.formats import Row, missing_field
from gptjax.text.labelled import Text, is_missing, label_name
from gptjax.text.rows import text_field
from gptjax.text.tokenizer import Tokenizer


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    tokenizer, examples = source.tokenizer, source.examples[name]
    task = config.task
    train, validation = (
        encode_texts(side, tokenizer, task.labels, task.multi_label, longest(config))
        for side in (examples.train, examples.validation)
    )
    windows = TextBatches(train, task, config.seed)
    predict = compiled(make_predict(config.model, task, name, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> LabelScores:
        return score(*predict_texts(predict, params, validation, task.labels, config.train.micro_batch, sharding))

    cut = int(train.cut.sum() + validation.cut.sum())
    note = (
        f"{len(examples.train):,} texts, {len(examples.validation):,} to validate on,"
        f" {cut:,} cut at {longest(config)} tokens"
    )
    return Task(
        windows,
        windows.mean_tokens,
        hash_arrays([*train.tokens, train.targets]),
        evaluate,
        (note, *examples.notes),
        evaluation_batches=-(-len(validation.tokens) // config.train.micro_batch),
        measured_on=hash_arrays([*validation.tokens, validation.targets]),
    )


def label_states_loss(config: Config, name: str) -> StatesLoss:
    """The cross-entropy of the labels that head `name` gives."""
    task, smoothing = config.task, config.train.label_smoothing
    return lambda params, x_BTD, batch: label_batch_loss(
        task, state_logits(task, params, name, x_BTD, batch), batch, smoothing
    )


def predict(
    config: Config,
    name: str,
    params: dict,
    tokenizer: Tokenizer,
    examples: Sequence[Text],
    batch_size: int,
    compute: Compute,
    sharding: jax.sharding.Sharding,
) -> tuple[Predictions, float]:
    """Returns the predictions of head `name`, and the mean loss over examples with labels."""
    task = config.task
    texts = encode_texts(examples, tokenizer, task.labels, task.multi_label, longest(config))
    compiled = compiled_predict(config.model, task, name, compute)
    return predict_texts(compiled, params, texts, task.labels, batch_size, sharding)


@functools.cache
def compiled_predict(model: ModelConfig, task: TaskConfig, name: str, compute: Compute) -> Predict:
    """The function that computes label probabilities, compiled once per batch shape."""
    return jax.jit(make_predict(model, task, name, compute))


def parse_row(row: Row, task: TaskConfig, data: DataConfig, labelled: bool, counts: Counter[str]) -> Text | None:
    """See `text.labelled.ParseRow`."""
    text = text_field(row, data.text_field)
    if not labelled:
        return Text(text, (), row.where)
    if task.label_field not in row.values:
        raise missing_field(row.where, task.label_field, "task.label_field", row.values)
    value = row.values[task.label_field]
    listed = isinstance(value, (list, tuple))
    given = value if listed else [value]
    if any(is_missing(item, task.labels) for item in given):
        counts["missing_label"] += 1
        return None
    labels = tuple(label_name(item, row, task.label_field) for item in given)
    if len(set(labels)) < len(labels):
        raise UserError(f"{row.where}: field {task.label_field!r} names a label twice")
    return Text(text, labels, row.where, listed)


KIND = Kind(build, label_states_loss, parse_row, lambda example: example.text, predict)
