"""Causal self-attention with the positions of a sequence sharded over devices (ring attention, arXiv:2310.01889).

Each device holds T/n positions in their order. A causal mask would give the last device n times the work of the first,
so a sequence is divided into 2n chunks, and during attention device d holds chunks d and 2n - 1 - d: its early and its
late half. Keys and values are then passed around the ring of devices. At each hop a device has two halves of queries
and two halves of keys; two of these four pairs are visible, for every pair of devices, so all devices do equal work:

    keys of device o   o < d                   o > d
    early queries      attend to early half    attend to nothing
    late queries       attend to early half    attend to both halves

Shape suffixes: as in `attention.py`; T the positions of one device, c = T / 2 those of a half, Z blocks of queries in a
half, N = R times the queries of a block. Arrays of halves have a leading axis of 2: early, late.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.ops.attention_heads import (
    AttentionInputs,
    DroppedWeights,
    drop_weights,
    group_queries,
    merge_rows,
    ungroup_queries,
)
from gptjax.ops.attention_spec import HIDDEN, AttentionSpec, Implementation, Request, exceeds_fused_kernel
from gptjax.ops.axes import POSITIONS, axis_size, positions_sharded
from gptjax.ops.matmul import dot, transpose_last_axes

LARGEST_BLOCK = 512  # queries that attend to a half of the keys at once


@dataclasses.dataclass(frozen=True)
class Ring:
    """The ring of devices, and the attention that they compute."""

    devices: int
    queries: int
    """Query heads per key head."""
    spec: AttentionSpec


class _Half(NamedTuple):
    """A half of a device's queries, in Z blocks."""

    q_ZBGNC: jax.Array
    start_Z: jax.Array
    """Position of each block's first query."""


class _Softmax(NamedTuple):
    """State of an online softmax: the largest score, the sum of the weights, the sum of weighted values."""

    largest: jax.Array
    total: jax.Array
    sums: jax.Array


class _Replicated(NamedTuple):
    """Arrays that every device holds for all positions of its sequences."""

    segments_BT: jax.Array | None
    drops: DroppedWeights | None


def _unsupported(request: Request) -> str | None:
    if not positions_sharded():
        return "positions are not sharded"
    if request.queries % (2 * axis_size(POSITIONS)):
        return f"{request.queries} positions are no multiple of twice mesh.context={axis_size(POSITIONS)}"
    return exceeds_fused_kernel(request, dropout_supported=True)


def _run(spec: AttentionSpec, inputs: AttentionInputs) -> jax.Array:
    q_BTHC, k_BTGC, v_BTGC, mask, _, drops = inputs
    ring = Ring(axis_size(POSITIONS), q_BTHC.shape[2] // k_BTGC.shape[2], spec)
    return ring_attention(ring, q_BTHC, k_BTGC, v_BTGC, mask.segments_BT, drops)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(
    ring: Ring,
    q_BTHC: jax.Array,
    k_BTGC: jax.Array,
    v_BTGC: jax.Array,
    segments: jax.Array | None,
    drops: DroppedWeights | None,
) -> jax.Array:
    """Computes `attention` on one device of the ring; called inside `shard_map`.

    Weights exist for one block of queries and half of a device's keys at a time; the backward pass recomputes them.

    Args:
        ring: Number of devices, and the spec.
        q_BTHC: Queries of this device.
        k_BTGC: Its keys.
        v_BTGC: Its values.
        segments: `[B, n T]`: the segments of all devices.
        drops: Row numbers of all devices.
    """
    return _forward(ring, q_BTHC, k_BTGC, v_BTGC, segments, drops)[0]


def _forward(ring, q_BTHC, k_BTGC, v_BTGC, segments, drops):
    H, G, dtype = q_BTHC.shape[2], k_BTGC.shape[2], q_BTHC.dtype
    replicated, here = _Replicated(segments, drops), jax.lax.axis_index(POSITIONS)
    qkv = _to_halves(ring, jnp.concatenate([q_BTHC, k_BTGC, v_BTGC], axis=2))
    half = _halves(ring, here, qkv[:, :, :, :H], G)
    keys = _keys(qkv[:, :, :, H : H + G]), _keys(qkv[:, :, :, H + G :])
    state = _Softmax(
        jnp.full((*half.q_ZBGNC.shape[:-1], 1), HIDDEN, jnp.float32),
        jnp.zeros((*half.q_ZBGNC.shape[:-1], 1), jnp.float32),
        jnp.zeros(half.q_ZBGNC.shape, jnp.float32),
    )

    def attend(state, keys, owner, a, b):
        """Attends queries of half `a` to keys of half `b` of device `owner`."""
        k_BGSC, v_BGSC = keys[0][b], keys[1][b]
        first = _chunk(ring, owner, b) * k_BGSC.shape[2]

        def block(given):
            q_BGNC, start, largest, total, sums = given
            scores = _scores(ring, replicated, q_BGNC, start, k_BGSC, first)
            new = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
            weights, fade = jnp.exp(scores - new), jnp.exp(largest - new)
            total = total * fade + jnp.sum(weights, axis=-1, keepdims=True)
            weights = _drop(ring, replicated, weights, start, first).astype(dtype)
            return _Softmax(new, total, sums * fade + dot("bgns,bgsc->bgnc", weights, v_BGSC, jnp.float32))

        of_half = jax.tree.map(lambda x: x[a], (*half, *state))
        return jax.tree.map(lambda x, new: x.at[a].set(new), state, jax.lax.map(block, of_half))

    for a, b in ((0, 0), (1, 1), (1, 0)):
        state = attend(state, keys, here, a, b)

    def next_hop(carry, hop):
        state, keys = carry
        keys = jax.tree.map(lambda x: _send_to_next(ring, x), keys)
        owner = (here - hop) % ring.devices
        same = jnp.where(owner < here, 0, 1)
        state = attend(attend(state, keys, owner, 1, 0), keys, owner, same, same)
        return (state, keys), None

    (state, _), _ = jax.lax.scan(next_hop, (state, keys), jnp.arange(1, ring.devices))
    y = (state.sums / state.total).astype(dtype)
    log_sums = jnp.log(state.total) + state.largest
    return _from_halves(ring, _positions_first(y, ring.queries)), (half, keys, y, log_sums, replicated)


def _backward(ring, saved, dy_BTHC):
    half, keys, y, log_sums, replicated = saved
    dtype, G, here = half.q_ZBGNC.dtype, keys[0].shape[2], jax.lax.axis_index(POSITIONS)
    dy = _halves(ring, here, _to_halves(ring, dy_BTHC.astype(dtype)), G).q_ZBGNC
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    dq = jnp.zeros(half.q_ZBGNC.shape, jnp.float32)
    # Gradients of keys are kept transposed, so that the large arrays, weights and dscores, need no transpose.
    dkeys = jax.tree.map(lambda x: jnp.zeros(x.swapaxes(-1, -2).shape, jnp.float32), keys)

    def attend(dq, dkeys, keys, owner, a, b):
        k_BGSC, v_BGSC = keys[0][b], keys[1][b]
        first = _chunk(ring, owner, b) * k_BGSC.shape[2]

        def block(total, given):
            q_BGNC, start, dy_BGNC, log_sum, delta = given
            weights = jnp.exp(_scores(ring, replicated, q_BGNC, start, k_BGSC, first) - log_sum)
            dweights = _drop(ring, replicated, dot("bgnc,bgsc->bgns", dy_BGNC, v_BGSC, jnp.float32), start, first)
            dscores = (weights * (dweights - delta) * ring.spec.logit_scale(q_BGNC.shape[-1])).astype(dtype)
            weights = _drop(ring, replicated, weights, start, first).astype(dtype)
            dk = dot("bgcn,bgns->bgcs", transpose_last_axes(q_BGNC), dscores, jnp.float32)
            dv = dot("bgcn,bgns->bgcs", transpose_last_axes(dy_BGNC), weights, jnp.float32)
            return jax.tree.map(jnp.add, total, (dk, dv)), dot("bgns,bgsc->bgnc", dscores, k_BGSC, jnp.float32)

        of_half = jax.tree.map(lambda x: x[a], (*half, dy, log_sums, delta))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), dkeys)
        found, dq_half = jax.lax.scan(block, zeros, of_half)
        return dq.at[a].add(dq_half), jax.tree.map(lambda total, x: total.at[b].add(x), dkeys, found)

    for a, b in ((0, 0), (1, 1), (1, 0)):
        dq, dkeys = attend(dq, dkeys, keys, here, a, b)

    def next_hop(carry, hop):
        dq, dkeys, keys = carry
        dkeys, keys = jax.tree.map(lambda x: _send_to_next(ring, x), (dkeys, keys))
        owner = (here - hop) % ring.devices
        same = jnp.where(owner < here, 0, 1)
        dq, dkeys = attend(dq, dkeys, keys, owner, 1, 0)
        return (*attend(dq, dkeys, keys, owner, same, same), keys), None

    (dq, dkeys, _), _ = jax.lax.scan(next_hop, (dq, dkeys, keys), jnp.arange(1, ring.devices))
    dkeys = jax.tree.map(lambda x: _send_to_next(ring, x), dkeys)  # the last hop returns them to their device
    parts = [_positions_first(dq, ring.queries), *(x_2BGCS.transpose(0, 1, 4, 2, 3) for x_2BGCS in dkeys)]
    dqkv = _from_halves(ring, jnp.concatenate([x.astype(dtype) for x in parts], axis=3))
    H = G * ring.queries
    return *jnp.split(dqkv, [H, H + G], axis=2), None, None


ring_attention.defvjp(_forward, _backward)


def _scores(ring, replicated, q_BGNC, start, k_BGSC, first):
    """Returns the logits `[B, G, N, S]` of queries from `start` and keys from `first`, with the mask added."""
    S, T = k_BGSC.shape[2], q_BGNC.shape[2] // ring.queries
    scores = dot("bgnc,bgsc->bgns", q_BGNC, k_BGSC, jnp.float32) * ring.spec.logit_scale(q_BGNC.shape[-1])
    t, s = start + jnp.arange(T)[:, None], first + jnp.arange(S)[None]
    outside = (t < s) | (s <= t - ring.spec.window) if ring.spec.window else t < s
    hidden = jnp.where(outside, HIDDEN, 0.0)[None]
    if replicated.segments_BT is not None:
        of_t = jax.lax.dynamic_slice_in_dim(replicated.segments_BT, start, T, axis=1)
        of_s = jax.lax.dynamic_slice_in_dim(replicated.segments_BT, first, S, axis=1)
        hidden = jnp.where(of_t[:, :, None] != of_s[:, None], HIDDEN, hidden)
    return scores + jnp.tile(hidden, (1, ring.queries, 1))[:, None]


def _drop(ring, replicated, weights, start, first):
    if replicated.drops is None:
        return weights
    T = weights.shape[2] // ring.queries
    rows_BTH = jax.lax.dynamic_slice_in_dim(replicated.drops.rows_BTH, start, T, axis=1)
    return drop_weights(replicated.drops._replace(rows_BTH=rows_BTH), ring.spec.dropout, weights, first)


# --- which device -----------------------------------------------------------------------------------------------------


def _chunk(ring, device, half):
    """Number, of 2n, of the chunk that is this half of a device."""
    return jnp.where(half == 0, device, 2 * ring.devices - 1 - device)


def _send_to_next(ring, x):
    """Sends an array to the next device of the ring."""
    return jax.lax.ppermute(x, POSITIONS, [(i, (i + 1) % ring.devices) for i in range(ring.devices)])


def _to_halves(ring, x_BTHC):
    """Exchanges each device's consecutive positions for its early and its late half, `[2, B, c, H, C]`."""
    odd = jax.lax.axis_index(POSITIONS) % 2
    sent = [jax.lax.ppermute(x, POSITIONS, _routes(ring, i)) for i, x in enumerate(jnp.split(x_BTHC, 2, axis=1))]
    return jnp.where(odd == 0, jnp.stack(sent), jnp.stack(sent[::-1]))


def _from_halves(ring, x_2BTHC):
    """Inverse of `_to_halves`."""
    odd = jax.lax.axis_index(POSITIONS) % 2
    sent = jnp.where(odd == 0, x_2BTHC, x_2BTHC[::-1])
    back = [[(there, here) for here, there in _routes(ring, i)] for i in range(2)]
    return jnp.concatenate([jax.lax.ppermute(sent[i], POSITIONS, back[i]) for i in range(2)], axis=1)


def _routes(ring, i):
    """Pairs (source, destination) for the first (i=0) or second (i=1) half of each device's positions.

    Each device sends one even and one odd chunk, and receives one of each.
    """
    chunks = [2 * device + i for device in range(ring.devices)]
    return [(c // 2, c if c < ring.devices else 2 * ring.devices - 1 - c) for c in chunks]


# --- layouts ----------------------------------------------------------------------------------------------------------


def _halves(ring, here, q_2BTHC, G):
    """Divides both halves of the queries into blocks, with heads before positions."""
    _, B, c, H, C = q_2BTHC.shape
    Z = next(count for count in range(max(1, -(-c // LARGEST_BLOCK)), c + 1) if c % count == 0)
    blocks = q_2BTHC.reshape(2, B, Z, c // Z, H, C).swapaxes(1, 2)
    q_2ZBGNC = jax.vmap(jax.vmap(lambda q_BTHC: merge_rows(group_queries(q_BTHC, G))))(blocks)
    starts = [_chunk(ring, here, half) * c + jnp.arange(Z) * (c // Z) for half in range(2)]
    return _Half(q_2ZBGNC, jnp.stack(starts))


def _keys(k_2BTGC):
    return k_2BTGC.transpose(0, 1, 3, 2, 4)


def _positions_first(x_2ZBGNC, R):
    """Inverse of the layout of `_halves`: `[2, B, c, H, C]`."""
    two, Z, B, G, N, C = x_2ZBGNC.shape
    x_2ZBTHC = jax.vmap(jax.vmap(ungroup_queries))(x_2ZBGNC.reshape(two, Z, B, G, R, N // R, C))
    return x_2ZBTHC.swapaxes(1, 2).reshape(two, B, Z * (N // R), G * R, C)


RING = Implementation("ring", _unsupported, _run)
