"""Layers cut over devices: each stage has some layers, and micro-batches go through the stages one after another.

All stages compute at once, as one function mapped over a leading axis of stages that is cut over `mesh.stage`; what
they hand on moves along that axis. So the compiler cuts rows, heads and widths inside of a stage as it does elsewhere.

Shape suffixes: S stage, L layers of a stage, M micro-batch, B rows in one, T position, D n_embd.
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
    """Parameters with a leading layer axis, and the others."""
    stacks = {name: part for name, part in params.items() if name in STACKS}
    return stacks, {name: part for name, part in params.items() if name not in STACKS}


def cut_layers(stacks: Any) -> Any:
    """From leaves `[S L, ...]` to `[S, L, ...]`."""
    S = axis_size(STAGES)

    def cut(leaf: jax.Array) -> jax.Array:
        leaf = leaf.reshape(S, -1, *leaf.shape[1:])
        rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(STAGES, *rest))

    return jax.tree.map(cut, stacks)


def join_layers(stacks: Any) -> Any:
    """Takes back `cut_layers`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacks)


def over_stages(function: Callable) -> Callable:
    """Maps a function over the leading axis of its arguments, which is cut over the stages."""
    return jax.vmap(function, spmd_axis_name=STAGES)


def hand_on(y_SBTD: jax.Array, first_BTD: jax.Array) -> jax.Array:
    """Gives each stage what the one before it made, and the first stage `first_BTD`."""
    return _pinned(jnp.where(_is_stage(0), first_BTD[None], jnp.roll(y_SBTD, 1, axis=0)))


def hand_back(dx_SBTD: jax.Array, last_BTD: jax.Array) -> jax.Array:
    """Gives each stage what the one after it made, and the last stage `last_BTD`."""
    return _pinned(jnp.where(_is_stage(axis_size(STAGES) - 1), last_BTD[None], jnp.roll(dx_SBTD, -1, axis=0)))


def of_stage(number: int, x_SBTD: jax.Array) -> jax.Array:
    """What one stage made, on all devices. A sum, since to take it out the compiler would gather that of all stages."""
    return jnp.sum(jnp.where(_is_stage(number), x_SBTD, 0.0), axis=0)


def of_micro_batches(inputs: Any, numbers_S: jax.Array) -> Any:
    """From leaves `[M, B, ...]` to those of the micro-batch that each stage is at, `[S, B, ...]`; numbers out of range
    give any.
    """
    return jax.tree.map(lambda x: jnp.take(x, jnp.clip(numbers_S, 0, x.shape[0] - 1), axis=0), inputs)


def stream(
    stage: Callable[[Any, jax.Array, jax.Array, Any], jax.Array],
    stacks: Any,
    x_BTD: jax.Array,
    inputs: Any,
) -> jax.Array:
    """Sends rows through all stages, in as many parts as there are stages where rows can be cut so.

    Args:
        stage: A function of its layers, its number, what it reads `[B', T, D]`, and inputs.
        stacks: Leaves `[S, L, ...]`.
        x_BTD: What the first stage reads.
        inputs: `BlockInputs` of whole rows, leaves `[B, ...]`.
    """
    S, (B, T, D) = axis_size(STAGES), x_BTD.shape
    M = math.gcd(B // math.gcd(B, math.prod(axis_size(axis) for axis in BATCH)), S)
    numbers_S = jnp.arange(S)
    # Every M-th row, so that each device keeps its rows.
    x_MBTD = constrain_sharding(x_BTD.reshape(B // M, M, T, D).swapaxes(0, 1), None, BATCH, POSITIONS)
    inputs = jax.tree.map(lambda x: x.reshape(B // M, M, *x.shape[1:]).swapaxes(0, 1), inputs)

    def tick(y_SBTD, t):
        x_SBTD = hand_on(y_SBTD, x_MBTD[jnp.minimum(t, M - 1)])
        y_SBTD = over_stages(stage)(stacks, numbers_S, x_SBTD, of_micro_batches(inputs, t - numbers_S))
        return y_SBTD, of_stage(S - 1, y_SBTD)

    start = _pinned(jnp.zeros((S, B // M, T, D), x_BTD.dtype))
    _, y_MBTD = jax.lax.scan(tick, start, jnp.arange(M + S - 1))
    return y_MBTD[S - 1 :].swapaxes(0, 1).reshape(B, T, D)


def _is_stage(number):
    return (jnp.arange(axis_size(STAGES)) == number)[:, None, None, None]


def _pinned(x_SBTD):
    return constrain_sharding(x_SBTD, STAGES, BATCH, POSITIONS)
