"""The gradient of a step whose layers are sharded over pipeline stages: one forward, one backward (1F1B).

Time is divided into ticks. At tick t, stage s (of S) runs micro-batch t - s forward and micro-batch t - 2(S - 1) + s
backward, if they exist (arXiv:2104.04473, section 2.2, in lockstep). The first S - 1 ticks run forward only and the
last S - 1 backward only, so a stage idles for S - 1 of M + S - 1 rounds. A stage stores the inputs of at most 2S - 1
micro-batches, independent of M, and recomputes its layers in the backward pass.

Shape suffixes: S stage, M micro-batch, B sequences in a micro-batch, T position, D n_embd, K = 2S - 1 ticks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.config.model import ModelConfig
from gptjax.model.gpt import Compute, apply_blocks, embed_tokens, final_norm
from gptjax.model.loss import inputs_of, positions_of
from gptjax.model.stages import (
    map_stages,
    merge_stages,
    select_micro_batches,
    select_stage,
    send_backward,
    send_forward,
    split_into_stages,
    split_stacks,
)
from gptjax.ops.axes import BATCH, POSITIONS, STAGES, axis_size, constrain_sharding, per_device
from gptjax.ops.cross_entropy import Loss


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a step in which a stage waits for the others."""
    return (stages - 1) / (micro_batches + stages - 1)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The model and the functions of a step, without its arrays."""

    model: ModelConfig
    compute: Compute
    """Precision, and `remat` and `unroll` for the recomputation in the backward pass."""
    states_loss: Callable[[dict, jax.Array, Any], Loss]
    """Returns the loss from all parameters, the final hidden states and a micro-batch."""
    join: Callable[[dict, dict], dict]
    """Merges trainable and frozen parameters into the tree that the model reads."""


class _Step(NamedTuple):
    """Arrays that no tick changes. `stacks` have a layer axis, divided into stages; `rest` are all other parameters."""

    stacks: dict
    rest: dict
    frozen_stacks: dict
    frozen_rest: dict
    batch: Any
    key: jax.Array | None
    scale: jax.Array


class _Carry(NamedTuple):
    """State that one tick passes to the next."""

    y_SBTD: jax.Array
    """Output of each stage."""
    dx_SBTD: jax.Array
    """Gradient of each stage's input, for the micro-batch that it ran backward."""
    inputs_KSBTD: jax.Array
    """Inputs of each stage in the last K ticks; those of tick t are at index t mod K."""
    loss: Loss
    stacks: dict
    """Sum of gradients so far; so is `rest`."""
    rest: dict


def pipelined_gradient(
    pieces: Pieces,
    trainable: dict,
    frozen: dict,
    batch: Any,
    key: jax.Array | None,
    scale: jax.Array,
) -> tuple[Loss, dict]:
    """Returns the loss, and the gradient of its objective times `scale`, both summed over micro-batches.

    Args:
        pieces: Model, loss, precision.
        trainable: Trainable parameters.
        frozen: Frozen parameters.
        batch: Batch of a task, leaves `[M, B, ...]`.
        key: PRNG key of the step; None: no dropout.
        scale: Factor of the objective.
    """
    (stacks, rest), (frozen_stacks, frozen_rest) = split_stacks(trainable), split_stacks(frozen)
    step = _Step(split_into_stages(stacks), rest, split_into_stages(frozen_stacks), frozen_rest, batch, key, scale)
    S, (M, B, T) = axis_size(STAGES), batch.inputs.shape

    def fill(carry, t):
        return _forward(pieces, step, carry, t), None

    def steady(carry, t):
        carry, dy_BTD = _loss_gradient(pieces, step, _forward(pieces, step, carry, t), t)
        return _backward(pieces, step, carry, t, dy_BTD), None

    def drain(carry, t):
        return _backward(pieces, step, carry, t, jnp.zeros(carry.dx_SBTD.shape[1:], carry.dx_SBTD.dtype)), None

    carry = _first_carry(step, (S, B, T, pieces.model.n_embd))
    for phase, start, stop in ((fill, 0, S - 1), (steady, S - 1, M + S - 1), (drain, M + S - 1, M + 2 * S - 2)):
        carry, _ = jax.lax.scan(phase, carry, jnp.arange(start, stop))
    return carry.loss, merge_stages(carry.stacks) | carry.rest


# --- a tick -----------------------------------------------------------------------------------------------------------


def _first_carry(step, shape_SBTD):
    nothing_SBTD = constrain_sharding(jnp.zeros(shape_SBTD, jnp.float32), STAGES, BATCH, POSITIONS)
    inputs_KSBTD = jnp.zeros((2 * shape_SBTD[0] - 1, *shape_SBTD), jnp.float32)
    zero = jnp.float32(0.0)
    gradients = jax.tree.map(jnp.zeros_like, (step.stacks, step.rest))
    inputs_KSBTD = constrain_sharding(inputs_KSBTD, None, STAGES, BATCH, POSITIONS)
    return _Carry(nothing_SBTD, nothing_SBTD, inputs_KSBTD, Loss(zero, zero, zero), *gradients)


def _forward(pieces, step, carry, t):
    """Runs the next micro-batch forward in each stage."""
    stages_S, K = _stages(), carry.inputs_KSBTD.shape[0]
    x_SBTD, m_S = send_forward(carry.y_SBTD, _embed(pieces, step, step.rest, t)), t - stages_S
    inputs = select_micro_batches(inputs_of(pieces.model, step.batch), m_S)
    run = functools.partial(_run_stage, pieces, step)
    y_SBTD = map_stages(run)(step.stacks, step.frozen_stacks, stages_S, x_SBTD, m_S, inputs)
    inputs_KSBTD = jax.lax.dynamic_update_index_in_dim(carry.inputs_KSBTD, x_SBTD, t % K, 0)
    return carry._replace(y_SBTD=y_SBTD, inputs_KSBTD=inputs_KSBTD)


def _loss_gradient(pieces, step, carry, t):
    """Computes the loss of the last stage's output, and the gradient of that output."""
    S = axis_size(STAGES)
    gradient = jax.value_and_grad(_final_loss, argnums=(2, 3), has_aux=True)
    y_BTD = select_stage(S - 1, carry.y_SBTD)
    (_, loss), (drest, dy_BTD) = gradient(pieces, step, step.rest, y_BTD, t - (S - 1))
    return carry._replace(loss=_add(carry.loss, loss), rest=_add(carry.rest, drest)), dy_BTD


def _backward(pieces, step, carry, t, dy_BTD):
    """Recomputes a micro-batch in each stage and runs it backward; `dy_BTD` is the gradient of the last output."""
    stages_S, K, M = _stages(), carry.inputs_KSBTD.shape[0], step.batch.inputs.shape[0]
    delay_S = 2 * (len(stages_S) - 1 - stages_S)  # ticks between a micro-batch's forward and backward pass
    m_S = t - delay_S - stages_S
    exists_S = (m_S >= 0) & (m_S < M)
    dy_SBTD = jnp.where(exists_S[:, None, None, None], send_backward(carry.dx_SBTD, dy_BTD), 0.0)
    x_SBTD, inputs = (
        _inputs_at(carry.inputs_KSBTD, (t - delay_S) % K),
        select_micro_batches(inputs_of(pieces.model, step.batch), m_S),
    )

    def run(stacks, frozen_stacks, s, x_BTD, m, inputs, dy_BTD):
        def recompute(stacks, x_BTD):
            return _run_stage(pieces, step, stacks, frozen_stacks, s, x_BTD, m, inputs)

        return jax.vjp(recompute, stacks, x_BTD)[1](dy_BTD)

    arrays = (step.stacks, step.frozen_stacks, stages_S, x_SBTD, m_S, inputs, dy_SBTD)
    dstacks, dx_SBTD = map_stages(run)(*arrays)
    _, pull = jax.vjp(lambda rest: _embed(pieces, step, rest, t - 2 * (len(stages_S) - 1)), step.rest)
    [drest] = pull(select_stage(0, dx_SBTD))
    return carry._replace(dx_SBTD=dx_SBTD, stacks=_add(carry.stacks, dstacks), rest=_add(carry.rest, drest))


# --- the parts of the model, for micro-batch m ------------------------------------------------------------------------


def _embed(pieces, step, rest, m):
    micro_batch = _micro_batch(step, m)
    tokens, positions, params = micro_batch.inputs, positions_of(micro_batch), _without_layers(pieces, step, rest)
    return embed_tokens(pieces.model, params, tokens, positions, key=_key(step, m))


def _run_stage(pieces, step, stacks, frozen_stacks, s, x_BTD, m, inputs):
    params = pieces.join(step.rest, step.frozen_rest) | pieces.join(stacks, frozen_stacks)
    first = s * (pieces.model.n_layer // axis_size(STAGES))
    options = {"compute": pieces.compute, "key": _key(step, m), "first": first}
    return apply_blocks(pieces.model, params, x_BTD, inputs, **options)[0]


def _final_loss(pieces, step, rest, x_BTD, m):
    params = _without_layers(pieces, step, rest)
    x_BTD = final_norm(pieces.model, params, x_BTD, compute=pieces.compute)
    loss = pieces.states_loss(params, x_BTD, _micro_batch(step, m))
    return loss.objective * step.scale, loss


def _without_layers(pieces, step, rest):
    """Parameters for the embedding and the loss. Layers are not read there; those of the first stage fill the tree."""
    stacks = jax.tree.map(lambda leaf: leaf[0], pieces.join(step.stacks, step.frozen_stacks))
    return pieces.join(rest, step.frozen_rest) | stacks


def _micro_batch(step, m):
    return jax.tree.map(lambda x: x[jnp.clip(m, 0, x.shape[0] - 1)], step.batch)


def _key(step, m):
    return None if step.key is None else jax.random.fold_in(step.key, m)


def _stages():
    return jnp.arange(axis_size(STAGES))


def _inputs_at(inputs_KSBTD: jax.Array, ticks_S: jax.Array) -> jax.Array:
    """Returns each stage's input at its own tick. `per_device` guarantees that no data moves between devices."""
    sharded = PartitionSpec(STAGES, BATCH, POSITIONS if inputs_KSBTD.shape[3] % axis_size(POSITIONS) == 0 else None)

    def here(inputs_KSBTD, ticks_S):
        return jax.lax.dynamic_index_in_dim(inputs_KSBTD, ticks_S[0], keepdims=False)

    return per_device(here, (PartitionSpec(None, *sharded), PartitionSpec(STAGES)), sharded)(inputs_KSBTD, ticks_S)


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(jnp.add, total, part)
