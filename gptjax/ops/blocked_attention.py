"""Causal self-attention in blocks of queries: for CPUs, and for GPUs where no kernel supports the request.

Shape suffixes: as in `attention_spec.py`; R = H / G query heads per key head, N = R times the queries of a block.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops.attention_heads import (
    AttentionInputs,
    DroppedWeights,
    drop_weights,
    group_queries,
    merge_rows,
    ungroup_queries,
)
from gptjax.ops.attention_spec import (
    HIDDEN,
    AttentionSpec,
    Implementation,
    Mask,
    Request,
    needs_dense_weights,
    outside_pattern,
)
from gptjax.ops.matmul import dot, row_major, transpose_last_axes
from gptjax.ops.scheduling import schedule_after

UNBLOCKED_POSITIONS = 512
"""Up to this length the plain implementation is used on a GPU where no kernel fits (float32, dropout)."""
FUSED_ROWS = 4096
"""XLA:CPU never passes an operation on fewer elements to its library."""
ALIASING = 512
"""Row lengths, in float32, that are a multiple of this map to few sets of the cache, which makes transposes slow."""


class Block(NamedTuple):
    """Queries from `start` to `stop`, and the first key that any of them attends to."""

    start: int
    stop: int
    first: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Divides T queries into blocks. Each block attends to all its keys at once, so no running softmax is needed."""

    length: int
    spec: AttentionSpec

    def ranges(self) -> list[Block]:
        """The blocks: at least 128 queries each, 512 on a GPU, and at most 16 of them."""
        size = max(512 if target_platform() == "gpu" else 128, -(-self.length // 16))
        starts = range(0, self.length, size)
        ranged = self.spec.window and not self.spec.sparse
        first = [max(0, start - self.spec.window + 1) if ranged else 0 for start in starts]
        return [Block(s, min(s + size, self.length), f) for s, f in zip(starts, first, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_attention(
    blocks: Blocks,
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    mask: Mask,
    slopes_H: jax.Array | None,
    drops: DroppedWeights | None,
) -> jax.Array:
    """Attention that holds the weights of one block of queries at a time instead of all T².

    The backward pass recomputes the weights (arXiv:2205.14135, section 3). A block skips keys that none of its queries
    attends to. Each block waits for the previous one, since XLA would otherwise run all blocks at once and hold all
    their weights.
    """
    return _blocked_forward(blocks, q_BTHC, k_BSGC, v_BSGC, mask, slopes_H, drops)[0]


def _blocked_forward(blocks, q_BTHC, k_BSGC, v_BSGC, mask, slopes_H, drops):
    dtype = q_BTHC.dtype
    k_BGSC, v_BGSC = _heads_first(k_BSGC), _heads_first(v_BSGC)
    q_BGRTC = group_queries(q_BTHC, k_BSGC.shape[2])
    outputs, log_sums, done = [], [], None
    for block in blocks.ranges():
        q_BGNC = schedule_after(merge_rows(q_BGRTC[:, :, :, block.start : block.stop]), done)
        scores, _ = _scores(blocks, block, q_BGNC, _visible_keys(k_BGSC, block), mask, slopes_H)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = _drop(blocks, weights, drops, block).astype(dtype)
        y_BGNC = (dot("bgns,bgsc->bgnc", weights, _visible_keys(v_BGSC, block), jnp.float32) / total).astype(dtype)
        # A single element would suffice, but XLA would compute it separately and break the fusion above.
        done = jnp.max(y_BGNC, keepdims=True)
        outputs.append(y_BGNC.reshape(*q_BGRTC.shape[:3], block.stop - block.start, -1))
        log_sums.append(None if _fuses(q_BGNC) else jnp.log(total) + largest)
    y_BGRTC = jnp.concatenate(outputs, axis=3)
    return ungroup_queries(y_BGRTC), (q_BGRTC, k_BGSC, v_BGSC, mask, slopes_H, drops, outputs, log_sums)


def _blocked_backward(blocks, saved, dy_BTHC):
    q_BGRTC, k_BGSC, v_BGSC, mask, slopes_H, drops, outputs, log_sums = saved
    dtype, C = q_BGRTC.dtype, q_BGRTC.shape[-1]
    dy_BGRTC = group_queries(dy_BTHC.astype(dtype), k_BGSC.shape[1])
    unused = 16 if k_BGSC.shape[2] % ALIASING == 0 else 0  # one line of a cache
    dk_BGCS = dv_BGCS = jnp.zeros((*k_BGSC.shape[:2], C, k_BGSC.shape[2] + unused), jnp.float32)
    dqs = []
    done = dy_BGRTC[:, :, 0]  # not None: XLA would keep the scores of the first block from the forward pass
    for block, y_BGRTC, log_sum in zip(blocks.ranges(), outputs, log_sums, strict=True):
        q_BGNC = schedule_after(merge_rows(q_BGRTC[:, :, :, block.start : block.stop]), done)
        dy_BGNC = schedule_after(merge_rows(dy_BGRTC[:, :, :, block.start : block.stop]), done)
        k, v = _visible_keys(k_BGSC, block), _visible_keys(v_BGSC, block)
        if dtype == jnp.float32:  # XLA copies float32 slices and would keep the forward pass's copies; not in bfloat16
            k, v = schedule_after(k, done), schedule_after(v, done)
        scores, slope = _scores(blocks, block, q_BGNC, k, mask, slopes_H)
        if log_sum is None:
            weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
            weights = (weights / jnp.sum(weights, axis=-1, keepdims=True)).astype(dtype)
        else:
            weights = jnp.exp(scores - log_sum).astype(dtype)
        dweights = dot("bgnc,bgsc->bgns", dy_BGNC, v, jnp.float32)
        dweights = _drop(blocks, dweights, drops, block)
        # equals the row sums of weights times their gradients, also with dropout (arXiv:2205.14135, appendix B.4)
        delta = jnp.sum(merge_rows(y_BGRTC).astype(jnp.float32) * dy_BGNC, axis=-1, keepdims=True)
        dscores = weights * (dweights - delta)
        # The scale is applied at the end, to smaller arrays.
        dscores = (dscores if slope is None else dscores * slope).astype(dtype)
        weights = _drop(blocks, weights.astype(jnp.float32), drops, block).astype(dtype)
        dq_BGNC = _threaded_matmul("bgns,bgsc->bgnc", dscores, k)
        dqs.append(dq_BGNC.reshape(*q_BGRTC.shape[:3], block.stop - block.start, C))
        # dk and dv are computed transposed, so that the large arrays, weights and dscores, need no transpose.
        dk_BGCS = _add_at(block, dk_BGCS, _threaded_matmul("bgcn,bgns->bgcs", transpose_last_axes(q_BGNC), dscores))
        dv_BGCS = _add_at(block, dv_BGCS, _threaded_matmul("bgcn,bgns->bgcs", transpose_last_axes(dy_BGNC), weights))
        done = dk_BGCS
    scale = blocks.spec.logit_scale(C)
    dq_BTHC = ungroup_queries((jnp.concatenate(dqs, axis=3) * scale).astype(dtype))
    dk_BGCS, dv_BGCS = (d[..., : k_BGSC.shape[2]] for d in (dk_BGCS * scale, dv_BGCS))
    dk_BSGC, dv_BSGC = (row_major(d.astype(dtype).transpose(0, 3, 1, 2)) for d in (dk_BGCS, dv_BGCS))
    return dq_BTHC, dk_BSGC, dv_BSGC, None, None, None


blocked_attention.defvjp(_blocked_forward, _blocked_backward)


def _visible_keys(x_BGSC, block):
    return x_BGSC[:, :, block.first : block.stop]


def _fuses(rows_BGNC):
    """Whether XLA:CPU's library fuses the softmax of these rows with the matmuls around it.

    Otherwise the forward pass stores the log-sums for the backward pass.
    """
    return rows_BGNC[..., 0].size >= FUSED_ROWS


def _threaded_matmul(spec, a, b):
    """Calls `dot` in float32 so that XLA:CPU's library distributes the batch over threads.

    The library does so only for a matmul that is fused with a reduction; the reduction here adds zero.
    """
    y = dot(spec, a, b, jnp.float32)
    return y + jnp.max(a, axis=-1, keepdims=True).astype(jnp.float32) * 0 if _fuses(a) else y


def _scores(blocks, block, q_BGNC, k_BGSC, mask, slopes_H):
    """Returns logits `[B, G, N, S]`, with `HIDDEN` where masked, and the derivative of the soft cap (None: no cap)."""
    spec, R = blocks.spec, q_BGNC.shape[2] // (block.stop - block.start)
    t, s = jnp.arange(block.start, block.stop)[:, None], jnp.arange(block.first, block.stop)[None]
    if spec.sparse:
        hidden = jnp.where((t < s)[None] | _outside_pattern(spec, block, mask.positions_BT, t, s), HIDDEN, 0.0)
    else:
        outside = (t < s) | (s <= t - spec.window) if spec.window else t < s
        hidden = jnp.where(outside, HIDDEN, 0.0)[None]  # added to the logits, which is faster than a select
    if (segments_BT := mask.segments_BT) is not None:
        other = segments_BT[:, block.start : block.stop, None] != segments_BT[:, None, block.first : block.stop]
        hidden = jnp.where(other, HIDDEN, hidden)
    scale, hidden = jnp.full((1,) * 4, spec.logit_scale(q_BGNC.shape[-1])), hidden[:, None]
    if _fuses(q_BGNC):
        # `schedule_after` gives each block its own copy. XLA would broadcast a copy that several matmuls share to the
        # size of the logits, and write it to memory.
        scale, hidden = schedule_after(scale, q_BGNC), schedule_after(hidden, q_BGNC)
    logits, derivative = dot("bgnc,bgsc->bgns", q_BGNC, k_BGSC, jnp.float32) * scale, None
    if spec.softcap:
        share = jnp.tanh(logits / spec.softcap)
        logits, derivative = spec.softcap * share, 1.0 - share * share
    if slopes_H is not None:
        slopes_GR = slopes_H.reshape(q_BGNC.shape[1], R, 1, 1)
        logits += (slopes_GR * (s - t)[None, None]).reshape(1, q_BGNC.shape[1], -1, k_BGSC.shape[2])
    return logits + jnp.tile(hidden, (1, 1, R, 1)), derivative


def _outside_pattern(spec, block, positions_BT, t, s):
    """True where the sparse pattern hides a key of the block, `[B or 1, T, S]`."""
    if positions_BT is None:
        return outside_pattern(spec, t, s)[None]
    queries, keys = positions_BT[:, block.start : block.stop, None], positions_BT[:, None, block.first : block.stop]
    return outside_pattern(spec, queries, keys)


def _drop(blocks, weights, drops, block):
    if drops is None:
        return weights
    here = drops._replace(rows_BTH=drops.rows_BTH[:, block.start : block.stop])
    return drop_weights(here, blocks.spec.dropout, weights, block.first)


def _heads_first(x_BTGC):
    return row_major(x_BTGC.transpose(0, 2, 1, 3))


def _add_at(block, total, part):
    """Adds a block's gradient of its keys to the gradient of all keys, in place."""
    here = total[..., block.first : block.stop] + part
    return jax.lax.dynamic_update_slice_in_dim(total, here, block.first, axis=-1)


def _unsupported(request: Request) -> str | None:
    if reason := needs_dense_weights(request):
        return reason
    if request.platform == "tpu":
        return "the plain implementation is used on TPUs"
    if request.platform == "gpu" and request.queries <= UNBLOCKED_POSITIONS:
        return f"all weights of {request.queries} positions fit in memory at once"
    return None


def _run(spec: AttentionSpec, inputs: AttentionInputs) -> jax.Array:
    q_BTHC, k_BSGC, v_BSGC, mask, bias, drops = inputs
    slopes_H = None if bias is None else bias.slopes_H
    blocks = Blocks(q_BTHC.shape[1], spec)
    return blocked_attention(blocks, q_BTHC, k_BSGC, v_BSGC, mask, slopes_H, drops)


BLOCKED = Implementation("blocked", _unsupported, _run)
