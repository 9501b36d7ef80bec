"""What a run learns: its examples, the loss of a batch, and how the model is measured."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from gptjax.batches.labelled import TextBatches, encode_texts
from gptjax.batches.multi import MultiBatch, MultiBatches, Windows
from gptjax.batches.packed import Asked, PackedSequences, encode_chats, encode_words
from gptjax.batches.pretraining import PackedWindows, evaluation_batches
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.evaluation.labels import LabelScores, MultiScores, require_finetune, score
from gptjax.evaluation.loss import Evaluation, make_eval_step, measure
from gptjax.evaluation.predict import make_predict, predict_texts, predict_words
from gptjax.model.gpt import Compute
from gptjax.model.loss import batch_states, label_batch_loss, state_logits, token_loss
from gptjax.ops.cross_entropy import Loss, LossOptions
from gptjax.report.progress import say
from gptjax.task_options import LABELLED, TaskConfig
from gptjax.text.labelled import Chat, Examples, Text, Words, read_examples
from gptjax.text.prepare import prepare
from gptjax.text.shards import Dataset, TokenSplit
from gptjax.text.tokenizer import Tokenizer, make_tokenizer

Scores = Evaluation | LabelScores | MultiScores
Compile = Callable[[Callable], Callable]
LossFunction = Callable[[dict, Any, jax.Array | None], Loss]
StatesLoss = Callable[[dict, jax.Array, Any], Loss]


@dataclasses.dataclass(frozen=True)
class Source:
    """What was read: tokens of text, or examples."""

    tokenizer: Tokenizer
    dataset: Dataset | None
    examples: dict[str, Examples]
    """By the name of the task's part; a task alone has its kind as name."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What the loop needs to know of a task."""

    windows: Windows
    tokens_per_row: float
    """Tokens in a row of a batch, on average."""
    data_hash: str
    evaluate: Callable[[dict, jax.sharding.Sharding], Scores]
    notes: tuple[str, ...] = ()
    """What the user should know of the examples, one line each."""


def read_source(config: Config, tokenizer: Tokenizer | None) -> Source:
    """Reads a run's text or examples, and makes its tokenizer where none is given.

    Raises:
        UserError: Something cannot be read, or is wrong.
    """
    if config.task.kind == "pretrain":
        cache = Path(config.cache_dir).expanduser()
        prepared = prepare(config.data, config.tokenizer, cache, report=say, tokenizer_override=tokenizer)
        return Source(prepared.tokenizer, prepared.dataset, {})
    if config.heads:
        require_finetune()
    examples = {name: read_examples(part.task, part.data) for name, part in parts_of(config).items()}
    if tokenizer is None:
        tokenizer = make_tokenizer(
            config.tokenizer, lambda: (_plain(e) for part in examples.values() for e in part.train)
        )
    return Source(tokenizer, None, examples)


def parts_of(config: Config) -> dict[str, Config]:
    """The config of each task of a run by its name; a task alone has its kind as name."""
    if config.task.kind == "multi":
        return {part.name: config.of_part(part) for part in config.parts}
    return {config.task.kind: config}


def with_labels(config: Config, examples: dict[str, Examples]) -> Config:
    """Fills in the labels that were found."""

    def filled(task: TaskConfig, name: str) -> TaskConfig:
        if task.kind not in LABELLED:
            return task
        found = examples[name]
        return dataclasses.replace(task, labels=found.labels, multi_label=found.multi_label)

    if config.task.kind == "multi":
        parts = (dataclasses.replace(part, task=filled(part.task, part.name)) for part in config.parts)
        return dataclasses.replace(config, parts=tuple(parts))
    return dataclasses.replace(config, task=filled(config.task, config.task.kind))


def make_loss(config: Config, compute: Compute) -> LossFunction:
    """Returns `loss(params, batch, key)`, summed over the batch."""
    losses = {name: make_part_loss(part, name, compute) for name, part in parts_of(config).items()}
    if config.task.kind != "multi":
        return losses[config.task.kind]

    def summed(params: dict, batch: MultiBatch, key: jax.Array | None) -> Loss:
        shares = {name: batch.shares[name][0] for name in losses}
        found = {name: loss(params, batch.parts[name], key) for name, loss in losses.items()}
        objective = jnp.stack([found[name].objective * shares[name] for name in losses])
        nll = jnp.stack([found[name].nll * shares[name] for name in losses])
        return Loss(jnp.sum(objective), jnp.sum(nll), jnp.sum(batch.counts))

    return summed


def make_part_loss(config: Config, name: str, compute: Compute) -> LossFunction:
    """Returns the loss of one task, whose head has that name."""
    of_states = make_states_loss(config, name)
    return lambda params, batch, key: of_states(params, batch_states(config.model, compute, params, batch, key), batch)


def make_states_loss(config: Config, name: str) -> StatesLoss:
    """Returns the loss of one task as a function of parameters, final hidden states, and the batch."""
    task, smoothing = config.task, config.train.label_smoothing
    if task.kind in LABELLED:
        return lambda params, x_BTD, batch: label_batch_loss(
            task, state_logits(task, params, name, x_BTD, batch), batch, smoothing
        )
    options = LossOptions(config.model.vocab_size, smoothing, config.train.z_loss)
    return lambda params, x_BTD, batch: token_loss(options, params, x_BTD, batch)


def make_task(config: Config, source: Source, compute: Compute, compiled: Compile) -> Task:
    """Builds batches and measurement of a run from what was read.

    Args:
        config: Knows vocabulary and labels by now.
        source: As `read_source` returns it.
        compute: Precision and layout.
        compiled: Makes a function of parameters and a batch a compiled one.
    """
    if source.dataset is not None:
        return _pretrain(config, source.dataset, compute, compiled)
    tasks = {}
    for name, part in parts_of(config).items():
        make = {"classify": _classify, "tag": _tag, "instruct": _instruct}[part.task.kind]
        tasks[name] = make(part, name, source.tokenizer, source.examples[name], compute, compiled)
    if config.task.kind != "multi":
        return tasks[config.task.kind]
    return _multi({part.name: part.weight for part in config.parts}, tasks)


def _multi(weights: dict[str, float], tasks: dict[str, Task]) -> Task:
    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> MultiScores:
        found = {name: task.evaluate(params, sharding) for name, task in tasks.items()}
        mean = sum(weights[name] * scores.val_loss for name, scores in found.items()) / sum(weights.values())
        return MultiScores(mean, found)

    return Task(
        MultiBatches({name: task.windows for name, task in tasks.items()}, weights),
        sum(task.tokens_per_row for task in tasks.values()),
        " ".join(task.data_hash for task in tasks.values()),
        evaluate,
        tuple(f"{name}: {note}" for name, task in tasks.items() for note in task.notes),
    )


def bytes_per_token(split: TokenSplit) -> float:
    """UTF-8 bytes of a split's text per target."""
    return split.n_bytes / max(1, split.n_tokens - 1)


def longest(config: Config) -> int:
    """Tokens of the longest text or window of a task."""
    return config.task.max_tokens or config.model.block_size


def _pretrain(config: Config, dataset: Dataset, compute: Compute, compiled: Compile) -> Task:
    model, train, across = config.model, config.train, config.data.attend_across_documents
    batches = list(
        evaluation_batches(dataset.validation, model.block_size, train.eval_windows, train.micro_batch, across)
    )
    eval_step, ratio = compiled(make_eval_step(model, compute)), bytes_per_token(dataset.validation)
    return Task(
        PackedWindows(dataset.train, model.block_size, config.seed, across),
        model.block_size,
        dataset.hash,
        lambda params, sharding: measure(eval_step, params, batches, sharding, ratio),
    )


def _classify(
    config: Config, name: str, tokenizer: Tokenizer, examples: Examples, compute: Compute, compiled: Compile
) -> Task:
    task = config.task
    train, validation = (
        encode_texts(side, tokenizer, task.labels, task.multi_label, longest(config))
        for side in (examples.train, examples.validation)
    )
    windows = TextBatches(train, task, config.seed)
    predict = compiled(make_predict(config.model, task, name, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> LabelScores:
        return score(*predict_texts(predict, params, validation, task.labels, config.train.micro_batch, sharding))

    cut = train.cut + validation.cut
    note = (
        f"{len(examples.train):,} texts, {len(examples.validation):,} to validate on,"
        f" {cut:,} cut at {longest(config)} tokens"
    )
    return Task(windows, windows.mean_tokens, _hash([*train.tokens, train.targets]), evaluate, (note,))


def _tag(
    config: Config, name: str, tokenizer: Tokenizer, examples: Examples, compute: Compute, compiled: Compile
) -> Task:
    task = config.task
    train = encode_words(examples.train, tokenizer, task.labels, longest(config), task.lookahead)
    validation = encode_words(examples.validation, tokenizer, task.labels, longest(config), task.lookahead)
    windows = PackedSequences(train.sequences, longest(config), config.seed)
    predict = compiled(make_predict(config.model, task, name, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> LabelScores:
        return score(*predict_words(predict, params, validation, task.labels, config.train.micro_batch, sharding))

    note = f"{len(examples.train):,} sentences, {len(examples.validation):,} to validate on"
    return Task(windows, windows.mean_tokens, _hash_of(train.sequences), evaluate, (note,))


def _instruct(
    config: Config, _name: str, tokenizer: Tokenizer, examples: Examples, compute: Compute, compiled: Compile
) -> Task:
    train, cut, left_out = encode_chats(examples.train, tokenizer, longest(config))
    if not train:
        raise UserError(
            f"task.max_tokens={longest(config)}: none of {len(examples.train):,} chats has a response that begins in it"
        )
    windows = PackedSequences(train, longest(config), config.seed)
    note = (
        f"{len(examples.train):,} chats, {len(examples.validation):,} to validate on; {cut:,} cut at"
        f" {longest(config)} tokens, {left_out:,} left out because nothing to learn was left"
    )
    evaluate = measure_chats(config, tokenizer, examples.validation, compute, compiled)
    return Task(windows, windows.mean_tokens, _hash_of(train), evaluate, (note,))


def measure_chats(
    config: Config, tokenizer: Tokenizer, chats: Sequence[Chat], compute: Compute, compiled: Compile
) -> Callable[[dict, jax.sharding.Sharding], Evaluation]:
    """Returns the measurement of responses: the next token's loss on what is to be learned."""
    sequences, _, _ = encode_chats(chats, tokenizer, longest(config))
    batches = [batch for _, batch in PackedSequences(sequences, longest(config), 0).ordered(config.train.micro_batch)]
    asked = sum(int((sequence.targets >= 0).sum()) for sequence in sequences)
    size = sum(len(text.encode()) for chat in chats for text, learn in chat.pieces if learn)
    eval_step = compiled(make_eval_step(config.model, compute))
    return lambda params, sharding: measure(eval_step, params, batches, sharding, size / max(1, asked))


def _plain(example: Text | Words | Chat) -> str:
    if isinstance(example, Text):
        return example.text
    return " ".join(example.words) if isinstance(example, Words) else "".join(text for text, _ in example.pieces)


def _hash_of(sequences: Sequence[Asked]) -> str:
    return _hash(array for sequence in sequences for array in (sequence.inputs, sequence.targets))


def _hash(arrays: Iterator[np.ndarray] | Sequence[np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(np.array(array.shape, np.int64).tobytes())
        digest.update(np.ascontiguousarray(array, np.int32).tobytes())
    return digest.hexdigest()
