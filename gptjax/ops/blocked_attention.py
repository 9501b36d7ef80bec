"""Causal self-attention in blocks of queries: for CPUs, and for GPUs where no kernel supports the request.

Shape suffixes: as in `attention_spec.py`; R = H / G query heads per key head, N = R times the queries of a block.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops.attention_heads import Drops, drop, group_queries, merge_rows, ungroup_queries
from gptjax.ops.attention_spec import HIDDEN, AttentionSpec, Bias, Implementation, Mask, Request, needs_dense_weights
from gptjax.ops.matmul import dot, row_major, transposed
from gptjax.ops.scheduling import schedule_after

WHOLE_ROWS = 512
"""Positions up to which a GPU without a kernel (float32, dropout) holds all weights of attention at once."""
FUSED_ROWS = 4096
"""XLA:CPU gives its library no operation on fewer elements."""
ALIASING = 512
"""Rows of a multiple of so many float32 share so few places of a processor's cache that a transpose of them is slow."""


class Block(NamedTuple):
    """Queries from `start` to `stop`, and the first key that any of them sees."""

    start: int
    stop: int
    first: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How T queries are cut. Each block sees all its keys at once, so no running softmax is needed."""

    length: int
    spec: AttentionSpec

    def ranges(self) -> list[Block]:
        """The blocks: at least 128 queries each, 512 on a GPU, and at most 16 of them."""
        size = max(512 if target_platform() == "gpu" else 128, -(-self.length // 16))
        starts = range(0, self.length, size)
        first = [max(0, start - self.spec.window + 1) if self.spec.window else 0 for start in starts]
        return [Block(s, min(s + size, self.length), f) for s, f in zip(starts, first, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_attention(
    blocks: Blocks,
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    segments_BT: jax.Array | None,
    slopes_H: jax.Array | None,
    drops: Drops | None,
) -> jax.Array:
    """Attention that never holds all T² weights: they exist for one block of queries, and are recomputed in the
    backward pass (arXiv:2205.14135, section 3). Keys that no query of a block attends to are skipped. Each block waits
    for the previous one; otherwise XLA starts all of them at once, and all their weights are in memory.
    """
    return _blocked_forward(blocks, q_BTHC, k_BSGC, v_BSGC, segments_BT, slopes_H, drops)[0]


def _blocked_forward(blocks, q_BTHC, k_BSGC, v_BSGC, segments_BT, slopes_H, drops):
    dtype = q_BTHC.dtype
    k_BGSC, v_BGSC = _heads_first(k_BSGC), _heads_first(v_BSGC)
    q_BGRTC = group_queries(q_BTHC, k_BSGC.shape[2])
    outputs, log_sums, done = [], [], None
    for block in blocks.ranges():
        q_BGNC = schedule_after(merge_rows(q_BGRTC[:, :, :, block.start : block.stop]), done)
        scores, _ = _scores(blocks, block, q_BGNC, _seen(k_BGSC, block), segments_BT, slopes_H)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = _drop(blocks, weights, drops, block).astype(dtype)
        y_BGNC = (dot("bgns,bgsc->bgnc", weights, _seen(v_BGSC, block), jnp.float32) / total).astype(dtype)
        # A single element would do, but XLA would compute that apart, from parts of what is fused above.
        done = jnp.max(y_BGNC, keepdims=True)
        outputs.append(y_BGNC.reshape(*q_BGRTC.shape[:3], block.stop - block.start, -1))
        log_sums.append(None if _fuses(q_BGNC) else jnp.log(total) + largest)
    y_BGRTC = jnp.concatenate(outputs, axis=3)
    return ungroup_queries(y_BGRTC), (q_BGRTC, k_BGSC, v_BGSC, segments_BT, slopes_H, drops, outputs, log_sums)


def _blocked_backward(blocks, saved, dy_BTHC):
    q_BGRTC, k_BGSC, v_BGSC, segments_BT, slopes_H, drops, outputs, log_sums = saved
    dtype, C = q_BGRTC.dtype, q_BGRTC.shape[-1]
    dy_BGRTC = group_queries(dy_BTHC.astype(dtype), k_BGSC.shape[1])
    unused = 16 if k_BGSC.shape[2] % ALIASING == 0 else 0  # one line of a cache
    dk_BGCS = dv_BGCS = jnp.zeros((*k_BGSC.shape[:2], C, k_BGSC.shape[2] + unused), jnp.float32)
    dqs = []
    done = dy_BGRTC[:, :, 0]  # not None: the forward pass's scores would be kept for the first block
    for block, y_BGRTC, log_sum in zip(blocks.ranges(), outputs, log_sums, strict=True):
        q_BGNC = schedule_after(merge_rows(q_BGRTC[:, :, :, block.start : block.stop]), done)
        dy_BGNC = schedule_after(merge_rows(dy_BGRTC[:, :, :, block.start : block.stop]), done)
        k, v = _seen(k_BGSC, block), _seen(v_BGSC, block)
        if dtype == jnp.float32:  # copies, which would be kept from the forward pass; in bfloat16 they are none
            k, v = schedule_after(k, done), schedule_after(v, done)
        scores, slope = _scores(blocks, block, q_BGNC, k, segments_BT, slopes_H)
        if log_sum is None:
            weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
            weights = (weights / jnp.sum(weights, axis=-1, keepdims=True)).astype(dtype)
        else:
            weights = jnp.exp(scores - log_sum).astype(dtype)
        dweights = dot("bgnc,bgsc->bgns", dy_BGNC, v, jnp.float32)
        dweights = _drop(blocks, dweights, drops, block)
        # the row sums of weights times their gradients, whatever dropout left out (arXiv:2205.14135, appendix B.4)
        delta = jnp.sum(merge_rows(y_BGRTC).astype(jnp.float32) * dy_BGNC, axis=-1, keepdims=True)
        dscores = weights * (dweights - delta)
        # The scale is applied at the end, to smaller arrays.
        dscores = (dscores if slope is None else dscores * slope).astype(dtype)
        weights = _drop(blocks, weights.astype(jnp.float32), drops, block).astype(dtype)
        dq_BGNC = _product("bgns,bgsc->bgnc", dscores, k)
        dqs.append(dq_BGNC.reshape(*q_BGRTC.shape[:3], block.stop - block.start, C))
        # dk and dv come out transposed: then neither weights nor dscores, the large ones, need a transpose
        dk_BGCS = _add_at(block, dk_BGCS, _product("bgcn,bgns->bgcs", transposed(q_BGNC), dscores))
        dv_BGCS = _add_at(block, dv_BGCS, _product("bgcn,bgns->bgcs", transposed(dy_BGNC), weights))
        done = dk_BGCS
    scale = blocks.spec.logit_scale(C)
    dq_BTHC = ungroup_queries((jnp.concatenate(dqs, axis=3) * scale).astype(dtype))
    dk_BGCS, dv_BGCS = (d[..., : k_BGSC.shape[2]] for d in (dk_BGCS * scale, dv_BGCS))
    dk_BSGC, dv_BSGC = (row_major(d.astype(dtype).transpose(0, 3, 1, 2)) for d in (dk_BGCS, dv_BGCS))
    return dq_BTHC, dk_BSGC, dv_BSGC, None, None, None


blocked_attention.defvjp(_blocked_forward, _blocked_backward)


def _seen(x_BGSC, block):
    return x_BGSC[:, :, block.first : block.stop]


def _fuses(rows_BGNC):
    """Whether XLA's library takes the softmax of these rows together with its products, tile by tile.

    It leaves out what has fewer elements, such as one for each row. Then the sums are kept for the backward pass.
    """
    return rows_BGNC[..., 0].size >= FUSED_ROWS


def _product(spec, a, b):
    """`dot` in float32, whose batch is cut over the processor's threads.

    XLA's library cuts only a batch that is reduced too, so there is a reduction here, which adds zero.
    """
    y = dot(spec, a, b, jnp.float32)
    return y + jnp.max(a, axis=-1, keepdims=True).astype(jnp.float32) * 0 if _fuses(a) else y


def _scores(blocks, block, q_BGNC, k_BGSC, segments_BT, slopes_H):
    """Logits `[B, G, N, S]`, hidden ones at `HIDDEN`; and the derivative of the soft cap, None where there is none."""
    spec, R = blocks.spec, q_BGNC.shape[2] // (block.stop - block.start)
    t, s = jnp.arange(block.start, block.stop)[:, None], jnp.arange(block.first, block.stop)[None]
    outside = (t < s) | (s <= t - spec.window) if spec.window else t < s
    hidden = jnp.where(outside, HIDDEN, 0.0)[None]  # added, which is faster than selecting
    if segments_BT is not None:
        other = segments_BT[:, block.start : block.stop, None] != segments_BT[:, None, block.first : block.stop]
        hidden = jnp.where(other, HIDDEN, hidden)
    scale, hidden = jnp.full((1,) * 4, spec.logit_scale(q_BGNC.shape[-1])), hidden[:, None]
    if _fuses(q_BGNC):
        # For these queries alone: what other matmuls read too would be written to memory, as large as the logits.
        scale, hidden = schedule_after(scale, q_BGNC), schedule_after(hidden, q_BGNC)
    logits, derivative = dot("bgnc,bgsc->bgns", q_BGNC, k_BGSC, jnp.float32) * scale, None
    if spec.softcap:
        share = jnp.tanh(logits / spec.softcap)
        logits, derivative = spec.softcap * share, 1.0 - share * share
    if slopes_H is not None:
        slopes_GR = slopes_H.reshape(q_BGNC.shape[1], R, 1, 1)
        logits += (slopes_GR * (s - t)[None, None]).reshape(1, q_BGNC.shape[1], -1, k_BGSC.shape[2])
    return logits + jnp.tile(hidden, (1, 1, R, 1)), derivative


def _drop(blocks, weights, drops, block):
    if drops is None:
        return weights
    here = drops._replace(rows_BTH=drops.rows_BTH[:, block.start : block.stop])
    return drop(here, blocks.spec.dropout, weights, block.first)


def _heads_first(x_BTGC):
    return row_major(x_BTGC.transpose(0, 2, 1, 3))


def _add_at(block, total, part):
    """Adds to a total over all keys what a block gives to the keys that it sees, in place."""
    here = total[..., block.first : block.stop] + part
    return jax.lax.dynamic_update_slice_in_dim(total, here, block.first, axis=-1)


def _unsupported(request: Request) -> str | None:
    if reason := needs_dense_weights(request):
        return reason
    if request.platform == "tpu":
        return "the plain implementation is used on TPUs"
    if request.platform == "gpu" and request.queries <= WHOLE_ROWS:
        return f"all weights of {request.queries} positions fit in memory at once"
    return None


def _run(
    spec: AttentionSpec,
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    mask: Mask,
    bias: Bias | None,
    drops: Drops | None,
) -> jax.Array:
    slopes_H = None if bias is None else bias.slopes_H
    blocks = Blocks(q_BTHC.shape[1], spec)
    return blocked_attention(blocks, q_BTHC, k_BSGC, v_BSGC, mask.segments_BT, slopes_H, drops)


BLOCKED = Implementation("blocked", _unsupported, _run)
