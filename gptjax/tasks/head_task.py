"""Builds the tasks whose head computes a vector for each row, and predicts with them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.batches.labelled import Encoded, TextBatches
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.evaluation.predict import Predict, predict_rows
from gptjax.model.gpt import Compute
from gptjax.tasks.functions import with_metric
from gptjax.tasks.heads import head_states_loss, make_predict
from gptjax.tasks.task import Compile, Kind, Source, StatesLoss, Task, hash_encoded, longest
from gptjax.text.labelled import Examples, ParseRow
from gptjax.text.tokenizers.base import Tokenizer


class HeadTask(NamedTuple):
    """The functions of a task with a head."""

    encode: Callable[[Config, Tokenizer, Sequence[Any]], Any]
    """Encodes examples to rows (`Encoded`)."""
    width: Callable[[Config, Any], int]
    """Number of outputs of a row."""
    decode: Callable[[Config, Sequence[Any], Any, np.ndarray], Any]
    """Returns the predictions, given the examples, their rows, and the outputs `[rows, width]`."""
    score: Callable[[Any, float], Any]
    """Returns the scores, given the predictions and the mean loss."""
    note: Callable[[Config, Examples, Any, Any], str]
    """The log line about the examples, given the encoded training and validation rows."""
    make_rewrite: Callable[..., Any] = lambda *_: None
    """Makes the augmentation of training texts, see `texts.make_rewrite`."""
    make_predict: Callable[..., Predict] = make_predict
    constants: Callable[[Config, Any], dict[str, np.ndarray]] = lambda *_: {}
    """Returns the parameters of the head that are computed from the training rows and not trained."""


def head_kind(
    head: HeadTask,
    parse_row: ParseRow,
    plain_text: Callable[[Any], str],
    outputs: Callable[[Any], Iterator[dict[str, Any]]],
    report: Callable[[Any, float], str],
    states_loss: Callable[[Config, str], StatesLoss] = head_states_loss,
) -> Kind:
    """Makes the registry's entry of a task with a head."""
    build, predict = functools.partial(_build, head), functools.partial(_predict_examples, head)
    return Kind(build, states_loss, parse_row, plain_text, predict, outputs, report)


def _build(head: HeadTask, config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """Builds the batches and the evaluation, see `task.Kind.build`."""
    examples, tokenizer = source.examples[name], source.tokenizer
    train, validation = (head.encode(config, tokenizer, side) for side in (examples.train, examples.validation))
    windows = TextBatches(train, config.task, config.seed, head.make_rewrite(config, tokenizer, examples.train))
    predict = compiled(head.make_predict(config.model, config.task, name, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> Any:
        batch_size = config.train.micro_batch
        found, loss = _run(head, config, predict, params, examples.validation, validation, batch_size, sharding)
        return with_metric(config.task, found, head.score(found, loss))

    return Task(
        windows,
        windows.mean_tokens,
        hash_encoded(train),
        evaluate,
        (head.note(config, examples, train, validation), *examples.notes),
        constants={name: leaves} if (leaves := head.constants(config, train)) else {},
        evaluation_batches=-(-len(validation.tokens) // config.train.micro_batch),
        measured_on=hash_encoded(validation),
    )


def _predict_examples(
    head: HeadTask,
    config: Config,
    name: str,
    params: dict,
    tokenizer: Tokenizer,
    examples: Sequence[Any],
    batch_size: int,
    compute: Compute,
    sharding: jax.sharding.Sharding,
) -> tuple[Any, float]:
    """Returns the predictions of head `name`, in the order of the examples, and the mean loss of those with targets."""
    predict = compiled_predict(head.make_predict, config.model, config.task, name, compute)
    rows = head.encode(config, tokenizer, examples)
    return _run(head, config, predict, params, examples, rows, batch_size, sharding)


def count_note(config: Config, examples: Examples, train: Encoded, validation: Encoded, what: str) -> str:
    """A log line that counts examples and cut rows; `what` names the examples."""
    cut = int(train.cut.sum() + validation.cut.sum())
    return (
        f"{len(examples.train):,} {what}, {len(examples.validation):,} to validate on, {cut:,} cut at"
        f" {longest(config)} tokens"
    )


def _run(head, config, predict, params, examples, rows, batch_size, sharding):
    outputs, loss = predict_rows(predict, params, rows, head.width(config, rows), batch_size, sharding)
    return head.decode(config, examples, rows, outputs), loss


@functools.cache
def compiled_predict(
    make: Callable[..., Predict], model: ModelConfig, task: TaskConfig, name: str, compute: Compute
) -> Predict:
    """Returns the jitted prediction; equal arguments share its compiled programs."""
    return jax.jit(make(model, task, name, compute))
