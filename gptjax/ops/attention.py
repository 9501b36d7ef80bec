"""Attention: chooses the first implementation that supports a request, and runs it.

Shape suffixes: as in `attention_spec.py`; R = H / G query heads per key head, E = R + 2: the queries, the key and the
value of one key head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.machine.platform import target_platform
from gptjax.ops import kernels
from gptjax.ops.attention_heads import AttentionInputs, DroppedWeights, number_weight_rows
from gptjax.ops.attention_spec import (
    CAUSAL,
    HIDDEN,
    NO_MASK,
    AttentionSpec,
    Bias,
    Implementation,
    Mask,
    Request,
    bias_HTS,
    distance_logits,
    distance_values,
    make_request,
)
from gptjax.ops.axes import BATCH, HEADS, POSITIONS, STAGES, axis_size, partition_spec, per_device
from gptjax.ops.blocked_attention import BLOCKED
from gptjax.ops.cudnn_attention import CUDNN
from gptjax.ops.kernel_attention import KERNEL
from gptjax.ops.matmul import row_major
from gptjax.ops.plain_attention import PLAIN
from gptjax.ops.ring_attention import RING
from gptjax.ops.splash_attention import SPLASH
from gptjax.ops.triton_attention import TRITON

IMPLEMENTATIONS = (RING, KERNEL, SPLASH, CUDNN, TRITON, BLOCKED, PLAIN)
"""In order of preference. The last one is the reference and supports every request."""

WRONG_PLATFORM = ("needs a ", "is for a ", "positions are not sharded")
"""Prefixes of reasons that concern the platform or the mesh. `explain` leaves these out."""


def choose(request: Request) -> tuple[Implementation, dict[str, str]]:
    """Returns the implementation for a request, and for each one before it in the table (by name) why it cannot run."""
    reasons: dict[str, str] = {}
    for implementation in IMPLEMENTATIONS:
        reason = implementation.unsupported(request)
        if reason is None:
            return implementation, reasons
        reasons[implementation.name] = reason
    raise AssertionError("the plain implementation supports every request")


def explain(request: Request) -> str:
    """Names the implementation for a request, and why faster ones of this platform cannot run."""
    implementation, reasons = choose(request)
    here = [f"{name}: {reason}" for name, reason in reasons.items() if not reason.startswith(WRONG_PLATFORM)]
    return implementation.name + (f" (not {'; not '.join(here)})" if here else "")


def self_attention(
    spec: AttentionSpec,
    qkv_BTGEC: jax.Array,
    mask: Mask = NO_MASK,
    bias: Bias | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Calls `attention` with packed queries, keys and values: each key head has R queries, one key and one value."""
    B, T, G, E, C = qkv_BTGEC.shape
    shapes = (B, T, G * (E - 2), C), (B, T, G, C)
    implementation, _ = choose(make_request(spec, *shapes, qkv_BTGEC.dtype, mask, bias, key, packed=True))
    if implementation.takes_packed:
        return implementation.run(spec, qkv_BTGEC, mask.segments_BT)
    return _per_device(implementation, spec, *split_heads(qkv_BTGEC), mask, bias, key)


def split_heads(qkv_BTGEC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, H, C]`, keys and values `[B, T, G, C]` each."""
    B, T, G, E, C = qkv_BTGEC.shape
    # The gradient of a split is one concatenation; that of three slices is a sum of three padded arrays.
    q, k, v = jax.lax.split(qkv_BTGEC, (E - 2, 1, 1), axis=3)
    return q.reshape(B, T, -1, C), k.reshape(B, T, G, C), v.reshape(B, T, G, C)


def attention(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    spec: AttentionSpec = CAUSAL,
    mask: Mask = NO_MASK,
    bias: Bias | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Attends each query to the keys that `spec` and `mask` allow; returns `[B, T, H, C]`.

    Args:
        q_BTHC: Queries.
        k_BSGC: Keys; query head h reads key head h // (H / G).
        v_BSGC: Values.
        spec: Causality, window, scale, soft cap, dropout.
        mask: Restricts further which keys a query may attend to.
        bias: Added to the logits, by distance.
        key: PRNG key for `spec.dropout`; None: no dropout.
    """
    implementation, _ = choose(make_request(spec, q_BTHC.shape, k_BSGC.shape, q_BTHC.dtype, mask, bias, key))
    return _per_device(implementation, spec, q_BTHC, k_BSGC, v_BSGC, mask, bias, key)


def _per_device(implementation, spec, q_BTHC, k_BSGC, v_BSGC, mask, bias, key):
    """Runs an implementation on each device's own sequences and heads, because XLA cannot shard a kernel."""
    B, T, H, _ = q_BTHC.shape
    drops = number_weight_rows(key, B, T, H) if key is not None and spec.dropout else None
    heads = HEADS if k_BSGC.shape[2] % axis_size(HEADS) == 0 else None
    # Axes of size 1 are named too: the backward pass of `shard_map` sums over every axis that is not named.
    batch = (*BATCH, STAGES) if axis_size(STAGES) == 1 else BATCH
    positions = POSITIONS if implementation is RING or axis_size(POSITIONS) == 1 else None
    sharded = partition_spec(q_BTHC.shape, batch, positions, heads)
    mask_specs = jax.tree.map(lambda x: partition_spec(x.shape, BATCH), mask)
    bias_specs = jax.tree.map(lambda x: partition_spec(x.shape, heads), bias)
    if bias is not None and bias.key_vectors_MC is not None:  # all heads share them
        bias_specs = jax.tree.map(lambda x: PartitionSpec(), bias)
    numbers = partition_spec((B, T, H), BATCH, None, heads)
    dropped = None if drops is None else DroppedWeights(PartitionSpec(), numbers)  # pyright: ignore[reportArgumentType]
    specs: Any = sharded, sharded, sharded, mask_specs, bias_specs, dropped
    call = per_device(functools.partial(implementation.run, spec), (AttentionInputs(*specs),), sharded)
    return call(AttentionInputs(q_BTHC, k_BSGC, v_BSGC, mask, bias, drops))


class FirstTokens(NamedTuple):
    """The same queries, rotated by other positions, for the first slots of a cache (attention sinks)."""

    q_BTHC: jax.Array
    slots: int
    """Number of these slots."""


def cached_attention(
    q_BTHC: jax.Array,
    k_BGSC: jax.Array,
    v_BGSC: jax.Array,
    visible_BTS: jax.Array,
    spec: AttentionSpec = CAUSAL,
    bias: Bias | None = None,
    distance_NTS: jax.Array | None = None,
    first: FirstTokens | None = None,
) -> jax.Array:
    """Attends a few new queries to a cache of keys and values; returns `[B, T, H, C]`.

    With a single query on a CPU, a kernel reads each visible slot once and no other slot. The gradient is always that
    of the reference.

    Args:
        q_BTHC: Queries.
        k_BGSC: Keys of all slots.
        v_BGSC: Values of all slots.
        visible_BTS: True for slots that a query may attend to. It already includes the window and the segments.
        spec: Scale and soft cap; its other fields are not read.
        bias: Added to the logits, by distance.
        distance_NTS: How far a query is behind the token in each slot, `[1 or B, T, S]`, which a bias needs.
        first: Queries for the first slots; None: `q_BTHC` attends to all slots.
    """
    plain_logits = bias is None and first is None and not spec.softcap and not spec.scale
    if q_BTHC.shape[1] == 1 and plain_logits and kernels.usable_for_a_cache(k_BGSC.dtype, q_BTHC.shape[3]):
        return _cached_by_kernel(q_BTHC, k_BGSC, v_BGSC, visible_BTS)
    return cached_attention_reference(q_BTHC, k_BGSC, v_BGSC, visible_BTS, spec, bias, distance_NTS, first)


@jax.custom_vjp
def _cached_by_kernel(q_B1HC, k_BGSC, v_BGSC, visible_B1S):
    visible_BS = jnp.broadcast_to(visible_B1S[:, 0], (k_BGSC.shape[0], k_BGSC.shape[2]))  # its batch size may be 1
    return kernels.cached_attention(q_B1HC[:, 0], k_BGSC, v_BGSC, visible_BS)[:, None].astype(q_B1HC.dtype)


def _cached_forward(q_B1HC, k_BGSC, v_BGSC, visible_B1S):
    return _cached_by_kernel(q_B1HC, k_BGSC, v_BGSC, visible_B1S), (q_B1HC, k_BGSC, v_BGSC, visible_B1S)


def _cached_backward(saved, dy_B1HC):
    *arrays, visible_B1S = saved
    _, derivative = jax.vjp(lambda q, k, v: cached_attention_reference(q, k, v, visible_B1S), *arrays)
    return *derivative(dy_B1HC), None


_cached_by_kernel.defvjp(_cached_forward, _cached_backward)


def cached_attention_reference(
    q_BTHC: jax.Array,
    k_BGSC: jax.Array,
    v_BGSC: jax.Array,
    visible_BTS: jax.Array,
    spec: AttentionSpec = CAUSAL,
    bias: Bias | None = None,
    distance_NTS: jax.Array | None = None,
    first: FirstTokens | None = None,
) -> jax.Array:
    """Computes `cached_attention` with XLA's matmuls; differentiable."""
    B, T, H, C = q_BTHC.shape
    G, S = k_BGSC.shape[1:3]
    R = H // G

    def logits_of(q_BTHC, k_BGSC, distance_NTS):
        q_BGRTC = q_BTHC.reshape(B, T, G, R, C).transpose(0, 2, 3, 1, 4)
        q_BGNC = q_BGRTC.reshape(B, G, R * T, C)
        if target_platform() == "cpu":  # otherwise XLA copies the keys of a single sequence at every token
            q_BGNC, k_BGSC = row_major(q_BGNC), row_major(k_BGSC)
        logits = jnp.einsum("bgnc,bgsc->bgns", q_BGNC, k_BGSC, preferred_element_type=jnp.float32)
        if bias is not None and bias.key_vectors_MC is not None:
            logits = logits + distance_logits(bias.key_vectors_MC, q_BGRTC, distance_NTS).reshape(logits.shape)
        return logits * spec.logit_scale(C)

    logits = logits_of(q_BTHC, k_BGSC, distance_NTS)
    if first is not None:
        of_first = logits_of(first.q_BTHC, k_BGSC[:, :, : first.slots], distance_NTS)
        logits = jax.lax.dynamic_update_slice(logits, of_first, (0, 0, 0, 0))
    if target_platform() == "cpu":
        v_BGSC = row_major(v_BGSC)
    if spec.softcap:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    logits = logits.reshape(B, G, R, T, S)
    if bias is not None:
        assert distance_NTS is not None  # a bias is one by distance
        added_NHTS = jax.vmap(lambda distance_TS: bias_HTS(bias, distance_TS))(distance_NTS)
        N = added_NHTS.shape[0]
        logits = logits + jnp.broadcast_to(added_NHTS, (N, H, T, S)).reshape(N, G, R, T, S)
    weights = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], logits, HIDDEN), axis=-1)
    weights_BGNS = weights.astype(q_BTHC.dtype).reshape(B, G, R * T, S)
    y_BGNC = jnp.einsum("bgns,bgsc->bgnc", weights_BGNS, v_BGSC, preferred_element_type=jnp.float32)
    if bias is not None and bias.value_vectors_MC is not None:
        assert distance_NTS is not None
        y_BGNC = y_BGNC + distance_values(bias.value_vectors_MC, weights, distance_NTS).reshape(y_BGNC.shape)
    y_BTGRC = y_BGNC.astype(q_BTHC.dtype).reshape(B, G, R, T, C).transpose(0, 3, 1, 2, 4)
    return y_BTGRC.reshape(B, T, H, C)
