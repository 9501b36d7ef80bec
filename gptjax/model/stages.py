"""Layers sharded over pipeline stages: each stage has some layers, and micro-batches pass through the stages in order.

All stages compute at once: one function is mapped over a leading stage axis that is sharded over `mesh.stage`, and
activations move along that axis. Inside a stage the compiler shards batch, heads and widths as it does elsewhere.

Shape suffixes: S stage, L layers of a stage, M micro-batch, B sequences in a micro-batch, T position, D n_embd.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.ops.axes import BATCH, POSITIONS, STAGES, axis_size, constrain_sharding

STACKS = ("blocks", "adapters")
"""Parameters with a leading layer axis."""


def split_stacks(params: dict) -> tuple[dict, dict]:
    """Splits parameters into those with a leading layer axis and the others."""
    stacks = {name: part for name, part in params.items() if name in STACKS}
    return stacks, {name: part for name, part in params.items() if name not in STACKS}


def split_into_stages(stacks: Any) -> Any:
    """Reshapes leaves `[S L, ...]` to `[S, L, ...]`, sharded over the stages."""
    S = axis_size(STAGES)

    def split(leaf: jax.Array) -> jax.Array:
        leaf = leaf.reshape(S, -1, *leaf.shape[1:])
        rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(STAGES, *rest))

    return jax.tree.map(split, stacks)


def merge_stages(stacks: Any) -> Any:
    """Inverse of `split_into_stages`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacks)


def map_stages(function: Callable) -> Callable:
    """Maps a function over the leading axis of its arguments, which is sharded over the stages."""
    return jax.vmap(function, spmd_axis_name=STAGES)


def send_forward(y_SBTD: jax.Array, first_BTD: jax.Array) -> jax.Array:
    """Sends each stage's output to the next stage, and `first_BTD` to the first stage."""
    return _constrained(jnp.where(_is_stage(0), first_BTD[None], jnp.roll(y_SBTD, 1, axis=0)))


def send_backward(dx_SBTD: jax.Array, last_BTD: jax.Array) -> jax.Array:
    """Sends each stage's gradient to the previous stage, and `last_BTD` to the last stage."""
    return _constrained(jnp.where(_is_stage(axis_size(STAGES) - 1), last_BTD[None], jnp.roll(dx_SBTD, -1, axis=0)))


def select_stage(number: int, x_SBTD: jax.Array) -> jax.Array:
    """Returns the array of one stage on all devices. A sum, because indexing would gather the arrays of all stages."""
    return jnp.sum(jnp.where(_is_stage(number), x_SBTD, 0.0), axis=0)


def select_micro_batches(inputs: Any, numbers_S: jax.Array) -> Any:
    """Selects a micro-batch for each stage: leaves `[M, B, ...]` become `[S, B, ...]`. Clips numbers out of range."""
    return jax.tree.map(lambda x: jnp.take(x, jnp.clip(numbers_S, 0, x.shape[0] - 1), axis=0), inputs)


def stream(
    stage: Callable[[Any, jax.Array, jax.Array, Any], jax.Array],
    stacks: Any,
    x_BTD: jax.Array,
    inputs: Any,
) -> jax.Array:
    """Runs a batch through all stages as S micro-batches, or fewer if the batch size on a device does not allow S.

    Args:
        stage: A function of the stage's layers, its number, its input `[B', T, D]`, and `BlockInputs`.
        stacks: Leaves `[S, L, ...]`.
        x_BTD: Input of the first stage.
        inputs: `BlockInputs` of the batch, leaves `[B, ...]`.
    """
    S, (B, T, D) = axis_size(STAGES), x_BTD.shape
    M = math.gcd(B // math.gcd(B, math.prod(axis_size(axis) for axis in BATCH)), S)
    numbers_S = jnp.arange(S)
    # A micro-batch takes every M-th sequence, so that no sequence moves to another device.
    x_MBTD = constrain_sharding(x_BTD.reshape(B // M, M, T, D).swapaxes(0, 1), None, BATCH, POSITIONS)
    inputs = jax.tree.map(lambda x: x.reshape(B // M, M, *x.shape[1:]).swapaxes(0, 1), inputs)

    def tick(y_SBTD, t):
        x_SBTD = send_forward(y_SBTD, x_MBTD[jnp.minimum(t, M - 1)])
        y_SBTD = map_stages(stage)(stacks, numbers_S, x_SBTD, select_micro_batches(inputs, t - numbers_S))
        return y_SBTD, select_stage(S - 1, y_SBTD)

    start = _constrained(jnp.zeros((S, B // M, T, D), x_BTD.dtype))
    _, y_MBTD = jax.lax.scan(tick, start, jnp.arange(M + S - 1))
    return y_MBTD[S - 1 :].swapaxes(0, 1).reshape(B, T, D)


def _is_stage(number):
    return (jnp.arange(axis_size(STAGES)) == number)[:, None, None, None]


def _constrained(x_SBTD):
    return constrain_sharding(x_SBTD, STAGES, BATCH, POSITIONS)
