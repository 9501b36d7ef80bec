"""Fills in what a config leaves to the data, the tokenizer, the base model and the machine."""

import dataclasses
import math
from pathlib import Path

from gptjax.checkpoints.run_dir import CONFIG_FILE, LoadedRun
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.start import load_run_config
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.train import TrainConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import are_spans
from gptjax.report.progress import say
from gptjax.tasks.multi import parts_of
from gptjax.tasks.registry import with_labels
from gptjax.tasks.task import Source, Task
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.training.precision import compute_dtype


def with_compute_dtype(config: Config, run_dir: Path) -> Config:
    """Resolves "auto": a run resumes in the type that it started with, whatever the machine."""
    chosen = config.train.compute_dtype
    if chosen == "auto" and (run_dir / CONFIG_FILE).exists():
        chosen = load_run_config(run_dir).train.compute_dtype
    return dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype=compute_dtype(chosen)))


def resolve(config: Config, source: Source, base: LoadedRun | None) -> Config:
    """Fills in what only the tokenizer, the labels and the base model know, and checks that they fit."""
    vocab_size = source.tokenizer.vocab_size
    if base is not None:
        if base.config.model.vocab_size < vocab_size:
            raise UserError(
                f"init_from={config.init_from}: its model knows {base.config.model.vocab_size} tokens,"
                f" the tokenizer has {vocab_size}"
            )
        if config.tokenizer not in (TokenizerConfig(), base.config.tokenizer):
            raise UserError(
                f"tokenizer.kind={config.tokenizer.kind!r} has no effect with init_from={config.init_from}, whose"
                f" tokenizer ({base.config.tokenizer.kind}) is used; leave the tokenizer's options out"
            )
        config = dataclasses.replace(config, model=_base_shape(config, base), tokenizer=base.config.tokenizer)
        config = with_base_rate(config, base.config.optim.learning_rate)
    elif config.model.vocab_size == 0:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    if config.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {vocab_size};"
            " leave it out, or raise it"
        )
    for part in parts_of(config).values():
        if part.task.max_tokens > config.model.block_size:
            raise UserError(
                f"task.max_tokens={part.task.max_tokens} must be at most model.block_size={config.model.block_size}"
            )
    if config.task.objective.kind == "masked" and not config.model.bidirectional:
        raise UserError(
            f"init_from={config.init_from}: was trained with model.bidirectional=false;"
            " task.objective.kind=masked predicts from both sides"
        )
    if config.task.kind == "seq2seq" and not config.model.encoder_layers:
        raise UserError(f"init_from={config.init_from}: has no encoder, which task.kind=seq2seq needs")
    if config.finetune.train == "top" and config.finetune.top_k > config.model.n_layer:
        raise UserError(f"finetune.top_k={config.finetune.top_k} must be at most model.n_layer={config.model.n_layer}")
    config = with_labels(config, source.examples)
    if config.train.best_by == "span_f1" and not are_spans(config.task.labels):
        raise UserError("train.best_by='span_f1' needs tags of the form B-x, I-x and O; choose accuracy or macro_f1")
    other = config.heads or config.task.objective.why_no_sample or config.model.encoder_layers
    if config.train.sample_tokens and not other:
        train = dataclasses.replace(config.train, sample_prompt=_sample_prompt(config, source.tokenizer))
        config = dataclasses.replace(config, train=train)
    return config


def with_base_rate(config: Config, rate_of_base: float) -> Config:
    """Turns `finetune.base_rate` into `optim.learning_rate`, and prints it."""
    share = config.finetune.base_rate
    if not share:
        return config
    rate = share * rate_of_base
    say(f"rate        {rate:.3g} = finetune.base_rate {share:g} x {rate_of_base:.3g} of {config.init_from}")
    least = min(config.optim.min_learning_rate, rate / 10)
    optim = dataclasses.replace(config.optim, learning_rate=rate, min_learning_rate=least)
    return dataclasses.replace(config, optim=optim, finetune=dataclasses.replace(config.finetune, base_rate=0.0))


def _sample_prompt(config: Config, tokenizer: Tokenizer) -> str:
    """`train.sample_prompt`; in place of the default, where the tokenizer has no newline, its first character.

    Raises:
        UserError: The tokenizer cannot encode the prompt that was given: now, not at the first evaluation.
    """
    prompt = config.train.sample_prompt
    try:
        tokenizer.encode(prompt)
    except UserError as error:
        if prompt == TrainConfig.sample_prompt:
            return tokenizer.decode([0])
        raise UserError(f"train.sample_prompt={prompt!r}: {error}") from None
    return prompt


def _base_shape(config: Config, base: LoadedRun) -> ModelConfig:
    """The base model's shape; the config may name only what does not change it, or what agrees with it."""
    default = type(config.model)()
    if base.config.model.adapter.kind != "none":
        raise UserError(
            f"init_from={config.init_from}: has a {base.config.model.adapter.kind} adapter of its own; start from the"
            " run under it, or merge the two with gptjax export --merge true and import the result"
        )
    shape = dataclasses.replace(base.config.model, dropout=config.model.dropout, adapter=config.model.adapter)
    for field in dataclasses.fields(default):
        wanted, has = getattr(config.model, field.name), getattr(shape, field.name)
        if wanted not in (getattr(default, field.name), has):
            raise UserError(
                f"model.{field.name}={wanted} differs from {has} of init_from={config.init_from}; leave it out"
            )
    return shape


def tokens_per_step(config: Config, task: Task) -> int:
    """Tokens in a batch; on average, where batches differ."""
    return round(config.train.batch_size * task.tokens_per_row)


def with_steps(config: Config, task: Task) -> Config:
    """Turns `train.num_epochs` into `train.num_steps`: as many batches as hold these tokens, rounded up."""
    if not config.train.num_epochs:
        return config
    tokens = config.train.num_epochs * task.windows.tokens_per_epoch
    steps = max(1, math.ceil(tokens / tokens_per_step(config, task) - 1e-9))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=steps, num_epochs=0.0))
