"""Attention: a request, and the first implementation that supports it.

Shape suffixes: as in `attention_spec.py`; R = H / G query heads per key head, E = R + 2: the queries, the key and the
value of one key head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.machine.platform import target_platform
from gptjax.ops import kernels
from gptjax.ops.attention_heads import Drops, number_rows
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
    make_request,
)
from gptjax.ops.axes import HEADS, POSITIONS, ROWS, STAGES, axis_size, per_device, spec_of
from gptjax.ops.blocked_attention import BLOCKED
from gptjax.ops.cudnn_attention import CUDNN
from gptjax.ops.kernel_attention import KERNEL
from gptjax.ops.matmul import row_major
from gptjax.ops.plain_attention import PLAIN
from gptjax.ops.ring_attention import RING
from gptjax.ops.splash_attention import SPLASH
from gptjax.ops.triton_attention import TRITON

IMPLEMENTATIONS = (RING, KERNEL, SPLASH, CUDNN, TRITON, BLOCKED, PLAIN)
"""The first one that supports a request computes it. The last one is the reference and supports everything."""

ELSEWHERE = ("needs a ", "is for a ", "positions are not sharded")
"""How reasons begin that only say that an implementation belongs to another platform or mesh."""


def choose(request: Request) -> tuple[Implementation, dict[str, str]]:
    """The implementation for a request, and why each one before it in the table was passed over, by its name."""
    reasons: dict[str, str] = {}
    for implementation in IMPLEMENTATIONS:
        reason = implementation.unsupported(request)
        if reason is None:
            return implementation, reasons
        reasons[implementation.name] = reason
    raise AssertionError("the plain implementation supports every request")


def explain(request: Request) -> str:
    """The implementation for a request, with the reasons against faster ones that exist on this platform."""
    implementation, reasons = choose(request)
    here = [f"{name}: {reason}" for name, reason in reasons.items() if not reason.startswith(ELSEWHERE)]
    return implementation.name + (f" (not {'; not '.join(here)})" if here else "")


def self_attention(
    spec: AttentionSpec,
    qkv_BTGEC: jax.Array,
    mask: Mask = NO_MASK,
    bias: Bias | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """`attention` of queries, keys and values in one array: for each key head its R queries, its key, its value."""
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
    """Attends each query to the keys that spec and mask let it see; returns `[B, T, H, C]`.

    Args:
        q_BTHC: Queries.
        k_BSGC: Keys; query head h reads key head h // (H / G).
        v_BSGC: Values.
        spec: What is computed.
        mask: Which keys a query may attend to, beyond what the spec says.
        bias: What is added to the logits by distance.
        key: Randomness for `spec.dropout`; None: no dropout.
    """
    implementation, _ = choose(make_request(spec, q_BTHC.shape, k_BSGC.shape, q_BTHC.dtype, mask, bias, key))
    return _per_device(implementation, spec, q_BTHC, k_BSGC, v_BSGC, mask, bias, key)


def _per_device(implementation, spec, q_BTHC, k_BSGC, v_BSGC, mask, bias, key):
    """Runs an implementation on each device's own rows and heads: the compiler cannot shard a kernel."""
    B, T, H, _ = q_BTHC.shape
    drops = number_rows(key, B, T, H) if key is not None and spec.dropout else None
    heads = HEADS if k_BSGC.shape[2] % axis_size(HEADS) == 0 else None
    # Axes of one device are named too: the backward pass would sum over those that are not.
    rows = (*ROWS, STAGES) if axis_size(STAGES) == 1 else ROWS
    positions = POSITIONS if implementation is RING or axis_size(POSITIONS) == 1 else None
    sharded = spec_of(q_BTHC.shape, rows, positions, heads)
    mask_specs = jax.tree.map(lambda x: spec_of(x.shape, ROWS), mask)
    bias_specs = jax.tree.map(lambda x: spec_of(x.shape, heads), bias)
    numbers = spec_of((B, T, H), ROWS, None, heads)
    dropped = None if drops is None else Drops(PartitionSpec(), numbers)  # pyright: ignore[reportArgumentType]
    run = functools.partial(implementation.run, spec)
    call = per_device(run, (sharded, sharded, sharded, mask_specs, bias_specs, dropped), sharded)
    return call(q_BTHC, k_BSGC, v_BSGC, mask, bias, drops)


def cached_attention(
    q_BTHC: jax.Array,
    k_BGSC: jax.Array,
    v_BGSC: jax.Array,
    visible_BTS: jax.Array,
    spec: AttentionSpec = CAUSAL,
    bias: Bias | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Attends a few new queries to a cache of keys and values; returns `[B, T, H, C]`.

    A kernel takes a single query; it reads visible slots only, and each once. Its gradient is that of the reference.

    Args:
        q_BTHC: Queries at slots `first`, `first + 1`, …
        k_BGSC: Keys of all slots.
        v_BGSC: Values of all slots.
        visible_BTS: Slots that each query may attend to; window and segments of `spec` are in it already.
        spec: Scale and soft cap.
        bias: What is added to the logits by distance.
        first: Slot of the first query.
    """
    plain_logits = bias is None and not spec.softcap and not spec.scale
    if q_BTHC.shape[1] == 1 and plain_logits and kernels.usable_for_a_cache(k_BGSC.dtype, q_BTHC.shape[3]):
        return _cached_by_kernel(q_BTHC, k_BGSC, v_BGSC, visible_BTS)
    return cached_attention_reference(q_BTHC, k_BGSC, v_BGSC, visible_BTS, spec, bias, first)


@jax.custom_vjp
def _cached_by_kernel(q_B1HC, k_BGSC, v_BGSC, visible_B1S):
    visible_BS = jnp.broadcast_to(visible_B1S[:, 0], (k_BGSC.shape[0], k_BGSC.shape[2]))  # one row may stand for all
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
    first: jax.Array | int = 0,
) -> jax.Array:
    """What `cached_attention` computes, by XLA's matmuls; it can be differentiated."""
    B, T, H, C = q_BTHC.shape
    G, S = k_BGSC.shape[1:3]
    R = H // G
    q_BGRTC = q_BTHC.reshape(B, T, G, R, C).transpose(0, 2, 3, 1, 4)
    q_BGNC = q_BGRTC.reshape(B, G, R * T, C)
    if target_platform() == "cpu":  # otherwise XLA copies a single sequence's keys and values for every token
        q_BGNC, k_BGSC, v_BGSC = (row_major(x) for x in (q_BGNC, k_BGSC, v_BGSC))
    logits = jnp.einsum("bgnc,bgsc->bgns", q_BGNC, k_BGSC, preferred_element_type=jnp.float32) * spec.logit_scale(C)
    if spec.softcap:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    logits = logits.reshape(B, G, R, T, S)
    if bias is not None:
        added = jnp.broadcast_to(bias_HTS(bias, first + jnp.arange(T), jnp.arange(S)), (H, T, S))
        logits = logits + added.reshape(1, G, R, T, S)
    weights = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], logits, HIDDEN), axis=-1)
    weights = weights.astype(q_BTHC.dtype).reshape(B, G, R * T, S)
    y_BGNC = jnp.einsum("bgns,bgsc->bgnc", weights, v_BGSC, preferred_element_type=jnp.float32)
    y_BTGRC = y_BGNC.astype(q_BTHC.dtype).reshape(B, G, R, T, C).transpose(0, 3, 1, 2, 4)
    return y_BTGRC.reshape(B, T, H, C)
