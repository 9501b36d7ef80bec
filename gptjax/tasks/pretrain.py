"""Learns the next token of prepared text."""

from gptjax.batches.pretraining import PackedWindows, evaluation_batches
from gptjax.config.run import Config
from gptjax.evaluation.loss import make_eval_step, measure
from gptjax.model.gpt import Compute
from gptjax.model.loss import loss_options, token_loss
from gptjax.tasks.task import Compile, Kind, Source, StatesLoss, Task
from gptjax.text.shards import TokenSplit


def build(config: Config, _name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    dataset = source.dataset
    assert dataset is not None
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
        evaluation_batches=len(batches),
        measured_on=f"{sum(int((batch.targets >= 0).sum()) for batch in batches)} targets of {dataset.hash}",
    )


def next_token_loss(config: Config, _name: str = "") -> StatesLoss:
    """The loss of predicting each token from those before it, where the batch has a target."""
    model = config.model
    options = loss_options(model, config.train.label_smoothing, config.train.z_loss)
    return lambda params, x_BTD, batch: token_loss(model, options, params, x_BTD, batch)


def bytes_per_token(split: TokenSplit) -> float:
    """UTF-8 bytes of a split's text per target."""
    return split.n_bytes / max(1, split.n_tokens - 1)


KIND = Kind(build, next_token_loss)
