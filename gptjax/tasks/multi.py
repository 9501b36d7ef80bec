"""Trains several tasks together: every batch has a part for each task."""

import jax
import jax.numpy as jnp

from gptjax.batches.multi import MultiBatch, MultiBatches
from gptjax.config.run import Config
from gptjax.evaluation.labels import MultiScores
from gptjax.ops.cross_entropy import Loss
from gptjax.tasks.task import LossFunction, Task


def parts_of(config: Config) -> dict[str, Config]:
    """The config of each task of a run by name; the name of a single task is its kind."""
    if config.task.kind == "multi":
        return {part.name: config.of_part(part) for part in config.parts}
    return {config.task.kind: config}


def with_shared_heads(config: Config, params: dict) -> dict:
    """Params in which a part that uses the head of another part has that head under its own name too."""
    shared = {part.name: params["heads"][part.head] for part in config.parts if part.head}
    return params | {"heads": params["heads"] | shared} if shared else params


def combined_loss(losses: dict[str, LossFunction]) -> LossFunction:
    """Sums the losses of the tasks, each times its share."""

    def summed(params: dict, batch: MultiBatch, key: jax.Array | None) -> Loss:
        shares = {name: batch.shares[name][0] for name in losses}
        found = {name: loss(params, batch.parts[name], key) for name, loss in losses.items()}
        objective = jnp.stack([found[name].objective * shares[name] for name in losses])
        nll = jnp.stack([found[name].nll * shares[name] for name in losses])
        extras = {f"{name}/{k}": x * shares[name] for name in losses for k, x in found[name].extras.items()}
        return Loss(jnp.sum(objective), jnp.sum(nll), jnp.sum(batch.counts), extras)

    return summed


def combine(weights: dict[str, float], tasks: dict[str, Task]) -> Task:
    """Combines several tasks into one, whose validation loss is the weighted mean of theirs."""

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
        constants={name: leaves for task in tasks.values() for name, leaves in task.constants.items()},
        evaluation_batches=sum(sizes) if all(sizes := [task.evaluation_batches for task in tasks.values()]) else 0,
        measured_on=" ".join(task.measured_on for task in tasks.values()),
    )
