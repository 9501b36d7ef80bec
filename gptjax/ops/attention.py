"""Causal self-attention.

Shape suffixes: B batch, T query position, S key position, H query heads, G key and value heads, R = H / G query
heads per key head, C head_dim, N = R times the queries of a block.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.ops.elementwise import dropout_keep
from gptjax.ops.matmul import dot, row_major, transposed
from gptjax.ops.order import after
from gptjax.ops.splash import splash_attention, splash_fits

MASKED = -1e30  # not -inf: a row that sees nothing must not become NaN


def attention(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    segments_BT: jax.Array | None = None,
    window: int = 0,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Attends each query to keys that are no later, in its segment and its window; returns `[B, T, H, C]`.

    Args:
        q_BTHC: Queries; S = T.
        k_BSGC: Keys; query head h reads key head h // (H / G).
        v_BSGC: Values.
        segments_BT: Document number of each position; None: one document.
        window: Keys that a query sees, its own included (arXiv:2004.05150, section 3.1); 0: all before it.
        dropout: Probability of dropping an attention weight.
        key: Randomness for dropout; None: no dropout.
    """
    rate = dropout if key is not None else 0.0
    backend = jax.default_backend()
    if backend == "cpu":
        return _blocked(Blocks(q_BTHC.shape[1], window, rate), q_BTHC, k_BSGC, v_BSGC, segments_BT, key)
    if backend == "gpu" and not rate and cudnn_works(q_BTHC.dtype, q_BTHC.shape[-1]):
        mask = None if segments_BT is None else _same_segment(segments_BT)[:, None]
        before = (window - 1, 0) if window else None
        return jax.nn.dot_product_attention(
            q_BTHC, k_BSGC, v_BSGC, mask=mask, is_causal=True, local_window_size=before, implementation="cudnn"
        )
    if backend == "tpu" and splash_fits(q_BTHC.shape[1], rate):
        return splash_attention(q_BTHC, k_BSGC, v_BSGC, segments_BT, window)
    return attention_reference(q_BTHC, k_BSGC, v_BSGC, segments_BT, window, rate, key)


def attention_reference(q_BTHC, k_BSGC, v_BSGC, segments_BT=None, window=0, dropout=0.0, key=None) -> jax.Array:
    """What `attention` computes, with all weights in memory and differentiated by JAX."""
    B, T, H, C = q_BTHC.shape
    G = k_BSGC.shape[2]
    q_BGRTC = q_BTHC.reshape(B, T, G, H // G, C).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bgrtc,bsgc->bgrts", q_BGRTC, k_BSGC, preferred_element_type=jnp.float32) * C**-0.5
    visible = jnp.tril(jnp.ones((T, T), bool))[None]
    if window:
        visible = visible & ~jnp.tril(jnp.ones((T, T), bool), -window)[None]
    if segments_BT is not None:
        visible = visible & _same_segment(segments_BT)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    if dropout and key is not None:
        keep, scale = dropout_keep(key, weights.shape, dropout)
        weights = jnp.where(keep, weights * scale, 0.0)
    y = jnp.einsum("bgrts,bsgc->btgrc", weights.astype(q_BTHC.dtype), v_BSGC, preferred_element_type=jnp.float32)
    return y.astype(q_BTHC.dtype).reshape(B, T, H, C)


def cached_attention(q_BTHC: jax.Array, k_BGSC: jax.Array, v_BGSC: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Attends a few new queries to a cache of keys and values; `visible_BTS` says which slots each may see."""
    B, T, H, C = q_BTHC.shape
    G = k_BGSC.shape[1]
    q_BGRTC = q_BTHC.reshape(B, T, G, H // G, C).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bgrtc,bgsc->bgrts", q_BGRTC, k_BGSC, preferred_element_type=jnp.float32) * C**-0.5
    weights = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], scores, MASKED), axis=-1).astype(q_BTHC.dtype)
    y = jnp.einsum("bgrts,bgsc->btgrc", weights, v_BGSC, preferred_element_type=jnp.float32)
    return y.astype(q_BTHC.dtype).reshape(B, T, H, C)


@functools.cache
def cudnn_works(dtype, head_dim: int) -> bool:
    """Runs cuDNN's fused attention once on this GPU; where it fails, `attention` uses plain XLA."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return False
    x = jnp.ones((1, 64, 1, head_dim), dtype)
    try:
        with jax.ensure_compile_time_eval():
            y = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        return bool(jnp.all(jnp.isfinite(y)))
    except Exception as error:  # whatever the driver or the library says, training can go on without it
        print(f"cuDNN attention is not available ({str(error).splitlines()[0]}); using XLA's")
        return False


def _same_segment(segments_BT):
    return segments_BT[:, :, None] == segments_BT[:, None, :]


# --- in blocks of queries: the CPU's way ----------------------------------------------------------------------


class Block(NamedTuple):
    """Queries from `start` to `stop`, and the first key that any of them sees."""

    start: int
    stop: int
    first: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How T queries are cut. Each block sees all its keys at once, so no running softmax is needed."""

    length: int
    window: int
    dropout: float

    def ranges(self) -> list[Block]:
        """The blocks: at least 128 queries each, at most 16 of them."""
        size = max(128, -(-self.length // 16))
        starts = range(0, self.length, size)
        first = [max(0, start - self.window + 1) if self.window else 0 for start in starts]
        return [Block(s, min(s + size, self.length), f) for s, f in zip(starts, first, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(blocks: Blocks, q_BTHC, k_BSGC, v_BSGC, segments_BT, key):
    """Attention that never holds all T² weights: they exist for one block of queries, and again in the backward
    pass (arXiv:2205.14135, section 3); keys that no query of a block sees are never computed. Each block waits for
    the one before: else XLA starts all of them at once, and all their weights are in memory.
    """
    return _blocked_forward(blocks, q_BTHC, k_BSGC, v_BSGC, segments_BT, key)[0]


def _blocked_forward(blocks, q_BTHC, k_BSGC, v_BSGC, segments_BT, key):
    dtype = q_BTHC.dtype
    k_BGSC, v_BGSC = _heads_first(k_BSGC), _heads_first(v_BSGC)
    q_BGRTC = _group_queries(q_BTHC, k_BSGC.shape[2])
    outputs, log_sums, y_BGNC = [], [], None
    for block in blocks.ranges():
        q_BGNC = after(_rows(q_BGRTC[:, :, :, block.start : block.stop]), y_BGNC)
        scores = _scores(blocks, block, q_BGNC, _seen(k_BGSC, block), segments_BT)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = _drop(blocks, weights, key, block.start).astype(dtype)
        y_BGNC = dot("bgns,bgsc->bgnc", weights, _seen(v_BGSC, block), jnp.float32) / total
        outputs.append(y_BGNC.astype(dtype).reshape(*q_BGRTC.shape[:3], block.stop - block.start, -1))
        log_sums.append(jnp.log(total) + largest)
    y_BGRTC = jnp.concatenate(outputs, axis=3)
    return _ungroup_queries(y_BGRTC), (q_BGRTC, k_BGSC, v_BGSC, segments_BT, key, log_sums)


def _blocked_backward(blocks, saved, dy_BTHC):
    q_BGRTC, k_BGSC, v_BGSC, segments_BT, key, log_sums = saved
    dtype, C = q_BGRTC.dtype, q_BGRTC.shape[-1]
    dy_BGRTC = _group_queries(dy_BTHC.astype(dtype), k_BGSC.shape[1])
    dqs, dk_BGCS, dv_BGCS = [], None, None
    for block, log_sum in zip(blocks.ranges(), log_sums, strict=True):
        q_BGNC = after(_rows(q_BGRTC[:, :, :, block.start : block.stop]), dk_BGCS)
        dy_BGNC = after(_rows(dy_BGRTC[:, :, :, block.start : block.stop]), dk_BGCS)
        k, v = _seen(k_BGSC, block), _seen(v_BGSC, block)
        weights = jnp.exp(_scores(blocks, block, q_BGNC, k, segments_BT) - log_sum)
        dweights = dot("bgnc,bgsc->bgns", dy_BGNC, v, jnp.float32)
        dweights = _drop(blocks, dweights, key, block.start)
        delta = jnp.sum(weights * dweights, axis=-1, keepdims=True)  # the softmax's own gradient term
        dscores = (weights * (dweights - delta) * C**-0.5).astype(dtype)
        weights = _drop(blocks, weights, key, block.start).astype(dtype)
        dq_BGNC = dot("bgns,bgsc->bgnc", dscores, k, dtype)
        dqs.append(dq_BGNC.reshape(*q_BGRTC.shape[:3], block.stop - block.start, C))
        # dk and dv come out transposed: then neither weights nor dscores, the large ones, need a transpose
        dk_BGCS = _add_at(block, dk_BGCS, dot("bgcn,bgns->bgcs", transposed(q_BGNC), dscores, jnp.float32))
        dv_BGCS = _add_at(block, dv_BGCS, dot("bgcn,bgns->bgcs", transposed(dy_BGNC), weights, jnp.float32))
    dq_BTHC = _ungroup_queries(jnp.concatenate(dqs, axis=3))
    assert dk_BGCS is not None and dv_BGCS is not None  # there is at least one block
    dk_BSGC, dv_BSGC = (row_major(d.astype(dtype).transpose(0, 3, 1, 2)) for d in (dk_BGCS, dv_BGCS))
    return dq_BTHC, dk_BSGC, dv_BSGC, None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _seen(x_BGSC, block):
    return x_BGSC[:, :, block.first : block.stop]


def _scores(blocks, block, q_BGNC, k_BGSC, segments_BT):
    """Scaled products `[B, G, N, S]`, with what a query may not see pushed to nothing."""
    R = q_BGNC.shape[2] // (block.stop - block.start)
    scores = dot("bgnc,bgsc->bgns", q_BGNC, k_BGSC, jnp.float32) * q_BGNC.shape[-1] ** -0.5
    t, s = jnp.arange(block.start, block.stop)[:, None], jnp.arange(block.first, block.stop)[None]
    outside = (t < s) | (s <= t - blocks.window) if blocks.window else t < s
    hidden = jnp.where(outside, MASKED, 0.0)[None]  # added, which is faster than selecting
    if segments_BT is not None:
        other = segments_BT[:, block.start : block.stop, None] != segments_BT[:, None, block.first : block.stop]
        hidden = jnp.where(other, MASKED, hidden)
    return scores + jnp.tile(hidden, (1, R, 1))[:, None]


def _drop(blocks, weights, key, start):
    if not blocks.dropout:
        return weights
    keep, scale = dropout_keep(jax.random.fold_in(key, start), weights.shape, blocks.dropout)
    return jnp.where(keep, weights * scale, 0.0)


def _heads_first(x_BTGC):
    return row_major(x_BTGC.transpose(0, 2, 1, 3))


def _group_queries(x_BTHC, G):
    B, T, H, C = x_BTHC.shape
    return row_major(x_BTHC.transpose(0, 2, 1, 3)).reshape(B, G, H // G, T, C)


def _ungroup_queries(x_BGRTC):
    B, G, R, T, C = x_BGRTC.shape
    return row_major(x_BGRTC.transpose(0, 3, 1, 2, 4)).reshape(B, T, G * R, C)


def _rows(x_BGRTC):
    """Merges the query heads of a key head with the queries: one product instead of R."""
    B, G, R, T, C = x_BGRTC.shape
    return x_BGRTC.reshape(B, G, R * T, C)


def _add_at(block, total, part):
    """Adds to a total over keys before those of this block what the block gives to the keys that it sees."""
    part = jnp.pad(part, ((0, 0),) * (part.ndim - 1) + ((block.first, 0),))
    if total is None:
        return part
    return part + jnp.pad(total, ((0, 0),) * (part.ndim - 1) + ((0, part.shape[-1] - total.shape[-1]),))
