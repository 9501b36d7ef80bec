"""Sequence labelling: a label for each word of a sentence."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.batches.packed import PackedSequences, encode_words
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import LabelScores, Predictions, score, score_table
from gptjax.evaluation.metric import ScoresWithMetric
from gptjax.evaluation.predict import predict_words
from gptjax.model.gpt import Compute
from gptjax.tasks.functions import with_metric
from gptjax.tasks.head_task import compiled_predict
from gptjax.tasks.heads import head_states_loss, make_predict
from gptjax.tasks.task import Compile, Kind, Source, Task, hash_sequences, longest
from gptjax.text.formats import Row
from gptjax.text.labelled import Words, is_missing, label_name, string_list
from gptjax.text.tokenizers.base import Tokenizer


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    tokenizer, examples = source.tokenizer, source.examples[name]
    task = config.task
    train = encode_words(examples.train, tokenizer, task.labels, longest(config), task.lookahead)
    validation = encode_words(examples.validation, tokenizer, task.labels, longest(config), task.lookahead)
    windows = PackedSequences(train.sequences, longest(config), config.seed)
    predict = compiled(make_predict(config.model, task, name, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> LabelScores | ScoresWithMetric:
        found, loss = predict_words(predict, params, validation, config.train.micro_batch, sharding)
        return with_metric(task, found, score(found, loss))

    note = f"{len(examples.train):,} sentences, {len(examples.validation):,} to validate on"
    if cut := sum(train.cut) + sum(validation.cut):
        note += f", {cut:,} with a word of which only the beginning is read (task.max_tokens={longest(config)})"
    return Task(
        windows,
        windows.mean_tokens,
        hash_sequences(train.sequences),
        evaluate,
        (note, *examples.notes),
        measured_on=hash_sequences(validation.sequences),
    )


def predict(
    config: Config,
    name: str,
    params: dict,
    tokenizer: Tokenizer,
    examples: Sequence[Words],
    batch_size: int,
    compute: Compute,
    sharding: jax.sharding.Sharding,
) -> tuple[Predictions, float]:
    """Predicts examples, see `Kind.predict`."""
    task = config.task
    words = encode_words(examples, tokenizer, task.labels, longest(config), task.lookahead)
    compiled = compiled_predict(make_predict, config.model, task, name, compute)
    return predict_words(compiled, params, words, batch_size, sharding)


def outputs(predictions: Predictions) -> Iterator[dict[str, Any]]:
    """The tag of each word and its probability. Probabilities of the other tags would be much longer than the text."""
    chosen, best = predictions.chosen.tolist(), predictions.probabilities_EN.max(axis=-1).tolist()
    for end, length in zip(np.cumsum(predictions.sentences).tolist(), predictions.sentences, strict=True):
        here = slice(end - length, end)
        yield {"predicted": [predictions.labels[n] for n in chosen[here]], "probabilities": best[here]}


def parse_row(row: Row, task: TaskConfig, data: DataConfig, labelled: bool, counts: Counter[str]) -> Words | None:
    """See `text.labelled.ParseRow`."""
    words = string_list(row, task.tokens_field, "task.tokens_field")
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise UserError(f"{row.where}: field {task.tokens_field!r} has no word, or one that is empty or no text")
    if not labelled:
        return Words(words, (), row.where)
    tags = string_list(row, task.tags_field, "task.tags_field")
    if len(tags) != len(words):
        raise UserError(f"{row.where}: {len(words)} words in {task.tokens_field!r}, {len(tags)} in {task.tags_field!r}")
    if any(is_missing(tag, task.labels) for tag in tags):
        counts["missing_label"] += 1
        return None
    return Words(words, tuple(label_name(tag, row, task.tags_field) for tag in tags), row.where)


KIND = Kind(build, head_states_loss, parse_row, lambda example: " ".join(example.words), predict, outputs, score_table)
