"""The gradient of a step whose layers are cut over stages: one forward, one backward.

Time goes in ticks. At tick t stage s (of S) runs micro-batch t - s forward, and, as soon as its turn comes, micro-batch
t - 2(S - 1) + s backward (1F1B, arXiv:2104.04473, section 2.2, in lockstep). The first S - 1 ticks are forward only,
the last S - 1 backward only, so of M + S - 1 rounds S - 1 are lost. A stage keeps the inputs of at most 2S - 1
micro-batches, however many there are, and runs its layers again to go backward.

Shape suffixes: S stage, M micro-batch, B rows in one, T position, D n_embd, K = 2S - 1 ticks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.config.model import ModelConfig
from gptjax.model.gpt import Compute, apply_blocks, embed_tokens, final_norm
from gptjax.model.loss import inputs_of, positions_of
from gptjax.model.stages import (
    cut_layers,
    hand_back,
    hand_on,
    join_layers,
    of_micro_batches,
    of_stage,
    over_stages,
    split_stacks,
)
from gptjax.ops.axes import BATCH, POSITIONS, STAGES, axis_size, constrain_sharding, per_device
from gptjax.ops.cross_entropy import Loss


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a step in which a stage waits for the others."""
    return (stages - 1) / (micro_batches + stages - 1)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a step is made of, beside its arrays."""

    model: ModelConfig
    compute: Compute
    """Precision; `remat` and `unroll` of what a stage runs again."""
    states_loss: Callable[[dict, jax.Array, Any], Loss]
    """Of all parameters, final hidden states, and a micro-batch."""
    join: Callable[[dict, dict], dict]
    """Makes of parameters that learn and that do not what the model reads."""


class _Step(NamedTuple):
    """What no tick changes. `stacks` have a layer axis, cut into stages; `rest` are the other parameters."""

    stacks: dict
    rest: dict
    frozen_stacks: dict
    frozen_rest: dict
    batch: Any
    key: jax.Array | None
    scale: jax.Array


class _Carry(NamedTuple):
    """What one tick leaves to the next."""

    y_SBTD: jax.Array
    """What each stage made."""
    dx_SBTD: jax.Array
    """The gradient of what each stage read, of the micro-batch that it ran backward."""
    read_KSBTD: jax.Array
    """What each stage read in the last ticks: tick t is at t mod K."""
    loss: Loss
    stacks: dict
    """Gradients so far."""
    rest: dict


def pipelined_gradient(
    pieces: Pieces,
    learning: dict,
    frozen: dict,
    batch: Any,
    key: jax.Array | None,
    scale: jax.Array,
) -> tuple[Loss, dict]:
    """Returns the loss, and the gradient of its objective times `scale`, both summed over micro-batches.

    Args:
        pieces: Model, loss, precision.
        learning: Parameters that learn.
        frozen: Those that do not.
        batch: Of a task, leaves `[M, B, ...]`.
        key: Randomness of the step; None: no dropout.
        scale: Of the objective.
    """
    (stacks, rest), (frozen_stacks, frozen_rest) = split_stacks(learning), split_stacks(frozen)
    step = _Step(cut_layers(stacks), rest, cut_layers(frozen_stacks), frozen_rest, batch, key, scale)
    S, (M, B, T) = axis_size(STAGES), batch.inputs.shape

    def fill(carry, t):
        return _forward(pieces, step, carry, t), None

    def steady(carry, t):
        carry, dy_BTD = _turn(pieces, step, _forward(pieces, step, carry, t), t)
        return _backward(pieces, step, carry, t, dy_BTD), None

    def drain(carry, t):
        return _backward(pieces, step, carry, t, jnp.zeros(carry.dx_SBTD.shape[1:], carry.dx_SBTD.dtype)), None

    carry = _first_carry(step, (S, B, T, pieces.model.n_embd))
    for phase, start, stop in ((fill, 0, S - 1), (steady, S - 1, M + S - 1), (drain, M + S - 1, M + 2 * S - 2)):
        carry, _ = jax.lax.scan(phase, carry, jnp.arange(start, stop))
    return carry.loss, join_layers(carry.stacks) | carry.rest


# --- a tick -----------------------------------------------------------------------------------------------------------


def _first_carry(step, shape_SBTD):
    nothing_SBTD = constrain_sharding(jnp.zeros(shape_SBTD, jnp.float32), STAGES, BATCH, POSITIONS)
    read_KSBTD = jnp.zeros((2 * shape_SBTD[0] - 1, *shape_SBTD), jnp.float32)
    zero = jnp.float32(0.0)
    gradients = jax.tree.map(jnp.zeros_like, (step.stacks, step.rest))
    read_KSBTD = constrain_sharding(read_KSBTD, None, STAGES, BATCH, POSITIONS)
    return _Carry(nothing_SBTD, nothing_SBTD, read_KSBTD, Loss(zero, zero, zero), *gradients)


def _forward(pieces, step, carry, t):
    """Each stage runs the next micro-batch."""
    stages_S, K = _stages(), carry.read_KSBTD.shape[0]
    x_SBTD, m_S = hand_on(carry.y_SBTD, _enter(pieces, step, step.rest, t)), t - stages_S
    inputs = of_micro_batches(inputs_of(step.batch), m_S)

    def run(stacks, frozen_stacks, s, x_BTD, m, inputs):
        return _run_stage(pieces, step, stacks, frozen_stacks, s, x_BTD, m, inputs)

    y_SBTD = over_stages(run)(step.stacks, step.frozen_stacks, stages_S, x_SBTD, m_S, inputs)
    read_KSBTD = jax.lax.dynamic_update_index_in_dim(carry.read_KSBTD, x_SBTD, t % K, 0)
    return carry._replace(y_SBTD=y_SBTD, read_KSBTD=read_KSBTD)


def _turn(pieces, step, carry, t):
    """The loss of what the last stage made, and where its gradient begins."""
    S = axis_size(STAGES)
    gradient = jax.value_and_grad(_leave, argnums=(2, 3), has_aux=True)
    y_BTD = of_stage(S - 1, carry.y_SBTD)
    (_, loss), (drest, dy_BTD) = gradient(pieces, step, step.rest, y_BTD, t - (S - 1))
    return carry._replace(loss=_add(carry.loss, loss), rest=_add(carry.rest, drest)), dy_BTD


def _backward(pieces, step, carry, t, dy_BTD):
    """Each stage runs a micro-batch again, and backward; `dy_BTD` is the gradient of what the last stage made."""
    stages_S, K, M = _stages(), carry.read_KSBTD.shape[0], step.batch.inputs.shape[0]
    back_S = 2 * (len(stages_S) - 1 - stages_S)  # ticks since the stage read what it now runs backward
    m_S = t - back_S - stages_S
    asked_S = (m_S >= 0) & (m_S < M)
    dy_SBTD = jnp.where(asked_S[:, None, None, None], hand_back(carry.dx_SBTD, dy_BTD), 0.0)
    x_SBTD, inputs = _read_at(carry.read_KSBTD, (t - back_S) % K), of_micro_batches(inputs_of(step.batch), m_S)

    def run(stacks, frozen_stacks, s, x_BTD, m, inputs, dy_BTD):
        def again(stacks, x_BTD):
            return _run_stage(pieces, step, stacks, frozen_stacks, s, x_BTD, m, inputs)

        return jax.vjp(again, stacks, x_BTD)[1](dy_BTD)

    arrays = (step.stacks, step.frozen_stacks, stages_S, x_SBTD, m_S, inputs, dy_SBTD)
    dstacks, dx_SBTD = over_stages(run)(*arrays)
    _, pull = jax.vjp(lambda rest: _enter(pieces, step, rest, t - 2 * (len(stages_S) - 1)), step.rest)
    [drest] = pull(of_stage(0, dx_SBTD))
    return carry._replace(dx_SBTD=dx_SBTD, stacks=_add(carry.stacks, dstacks), rest=_add(carry.rest, drest))


# --- the pieces of the model, of micro-batch m ------------------------------------------------------------------------


def _enter(pieces, step, rest, m):
    micro_batch = _micro_batch(step, m)
    tokens, positions, params = micro_batch.inputs, positions_of(micro_batch), _without_layers(pieces, step, rest)
    return embed_tokens(pieces.model, params, tokens, positions, key=_key(step, m))


def _run_stage(pieces, step, stacks, frozen_stacks, s, x_BTD, m, inputs):
    params = pieces.join(step.rest, step.frozen_rest) | pieces.join(stacks, frozen_stacks)
    first = s * (pieces.model.n_layer // axis_size(STAGES))
    options = {"compute": pieces.compute, "key": _key(step, m), "first": first}
    return apply_blocks(pieces.model, params, x_BTD, inputs, **options)[0]


def _leave(pieces, step, rest, x_BTD, m):
    params = _without_layers(pieces, step, rest)
    x_BTD = final_norm(pieces.model, params, x_BTD, compute=pieces.compute)
    loss = pieces.states_loss(params, x_BTD, _micro_batch(step, m))
    return loss.objective * step.scale, loss


def _without_layers(pieces, step, rest):
    """Parameters for what comes before and after the layers: those of the first stage stand for what is not read."""
    stacks = jax.tree.map(lambda leaf: leaf[0], pieces.join(step.stacks, step.frozen_stacks))
    return pieces.join(rest, step.frozen_rest) | stacks


def _micro_batch(step, m):
    return jax.tree.map(lambda x: x[jnp.clip(m, 0, x.shape[0] - 1)], step.batch)


def _key(step, m):
    return None if step.key is None else jax.random.fold_in(step.key, m)


def _stages():
    return jnp.arange(axis_size(STAGES))


def _read_at(read_KSBTD: jax.Array, ticks_S: jax.Array) -> jax.Array:
    """What each stage read at a tick of its own. Each device looks up its stage's, as the compiler might not."""
    cut = PartitionSpec(STAGES, BATCH, POSITIONS if read_KSBTD.shape[3] % axis_size(POSITIONS) == 0 else None)

    def here(read_KSBTD, ticks_S):
        return jax.lax.dynamic_index_in_dim(read_KSBTD, ticks_S[0], keepdims=False)

    return per_device(here, (PartitionSpec(None, *cut), PartitionSpec(STAGES)), cut)(read_KSBTD, ticks_S)


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(jnp.add, total, part)
