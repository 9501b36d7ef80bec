"""Causal self-attention.

Shape suffixes: B batch, T query position, S key position, H query heads, G key and value heads, R = H / G query
heads per key head, E = R + 2, C head_dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gptjax.ops import kernels
from gptjax.ops.axes import HEADS, POSITIONS, ROWS, STAGES, axis_size, per_device, positions_cut, spec_of
from gptjax.ops.blocked_attention import Blocks, blocked_attention
from gptjax.ops.heads import MASKED, Drops, drop, number_rows
from gptjax.ops.matmul import row_major
from gptjax.ops.order import same_bits_asked
from gptjax.ops.ring_attention import Ring, ring_attention
from gptjax.ops.splash import splash_attention, splash_fits
from gptjax.ops.triton_attention import triton_attention, triton_fits

WHOLE_ROWS = 512
"""Positions up to which a GPU without a kernel (float32, dropout) holds all weights of attention at once."""


def self_attention(
    qkv_BTGEC: jax.Array,
    segments_BT: jax.Array | None = None,
    window: int = 0,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """`attention` of queries, keys and values in one array: for each key head its R queries, its key, its value.

    A kernel takes it as it is; the other forms take three arrays.
    """
    _, T, _, _, C = qkv_BTGEC.shape
    if not (dropout and key is not None) and kernels.usable(qkv_BTGEC.dtype, T, C):
        return _by_kernel(window, qkv_BTGEC, segments_BT)
    q_BTHC, k_BTGC, v_BTGC = split_heads(qkv_BTGEC)
    return attention(q_BTHC, k_BTGC, v_BTGC, segments_BT, window, dropout, key)


def split_heads(qkv_BTGEC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[B, T, H, C]`, keys and values `[B, T, G, C]` each."""
    B, T, G, E, C = qkv_BTGEC.shape
    # Its gradient is one concatenation; that of three slices, a sum of three padded arrays.
    q, k, v = jax.lax.split(qkv_BTGEC, (E - 2, 1, 1), axis=3)
    return q.reshape(B, T, -1, C), k.reshape(B, T, G, C), v.reshape(B, T, G, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(window, qkv_BTGEC, segments_BT):
    return kernels.attention(qkv_BTGEC, segments_BT, window)[0]


def _kernel_forward(window, qkv_BTGEC, segments_BT):
    y_BTHC, log_sums_BHT = kernels.attention(qkv_BTGEC, segments_BT, window)
    return y_BTHC, (qkv_BTGEC, segments_BT, y_BTHC, log_sums_BHT)


def _kernel_backward(window, saved, dy_BTHC):
    qkv_BTGEC, segments_BT, y_BTHC, log_sums_BHT = saved
    return kernels.attention_gradient(qkv_BTGEC, segments_BT, y_BTHC, log_sums_BHT, dy_BTHC, window), None


_by_kernel.defvjp(_kernel_forward, _kernel_backward)


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
    B, T, H, _ = q_BTHC.shape
    rate = dropout if key is not None else 0.0
    drops = number_rows(key, B, T, H) if key is not None and rate else None
    ring = positions_cut() and T % (2 * axis_size(POSITIONS)) == 0
    if ring:
        around = Ring(axis_size(POSITIONS), H // k_BSGC.shape[2], window, rate)
        form = functools.partial(ring_attention, around)
    else:
        form = form_of(T, window, rate, q_BTHC.dtype, q_BTHC.shape[-1], segments_BT is not None)
    # Kernels cannot be cut by the compiler, so each device calls one for its own rows and heads.
    heads = HEADS if k_BSGC.shape[2] % axis_size(HEADS) == 0 else None
    # Axes of one device are named too: the backward pass would sum over those that are not.
    rows = (*ROWS, STAGES) if axis_size(STAGES) == 1 else ROWS
    cut = spec_of(q_BTHC.shape, rows, POSITIONS if ring or axis_size(POSITIONS) == 1 else None, heads)
    segments = None if segments_BT is None else spec_of(segments_BT.shape, ROWS)
    numbers = spec_of((B, T, H), ROWS, None, heads)
    dropped = None if drops is None else Drops(PartitionSpec(), numbers)  # pyright: ignore[reportArgumentType]
    call = per_device(form, (cut, cut, cut, segments, dropped), cut)
    return call(q_BTHC, k_BSGC, v_BSGC, segments_BT, drops)


def form_of(T: int, window: int, rate: float, dtype, head_dim: int, masked: bool) -> Callable[..., jax.Array]:
    """The fastest form for whole rows: a function of queries, keys, values, segments and what is dropped."""
    backend = jax.default_backend()
    if backend == "cpu":
        return functools.partial(blocked_attention, Blocks(T, window, rate))
    if backend == "gpu":
        return _form_on_gpu(T, window, rate, dtype, head_dim, masked)
    if backend == "tpu" and splash_fits(T, rate):
        return functools.partial(splash_attention, window)
    return functools.partial(_plain, window, rate)


def _form_on_gpu(T, window, rate, dtype, head_dim, masked):
    if same_bits_asked():  # cuDNN's gradients are added up in the order of arrival
        if triton_fits(T, head_dim, window, rate, dtype):
            return triton_attention
    elif not rate and cudnn_works(dtype, T, head_dim, window, masked):
        return functools.partial(_cudnn, window)
    if T > WHOLE_ROWS:
        return functools.partial(blocked_attention, Blocks(T, window, rate))
    return functools.partial(_plain, window, rate)


def attention_reference(q_BTHC, k_BSGC, v_BSGC, segments_BT=None, window=0, dropout=0.0, key=None) -> jax.Array:
    """What `attention` computes, with all weights in memory and differentiated by JAX."""
    drops = number_rows(key, *q_BTHC.shape[:3]) if key is not None and dropout else None
    return _plain(window, dropout, q_BTHC, k_BSGC, v_BSGC, segments_BT, drops)


def _plain(window, rate, q_BTHC, k_BSGC, v_BSGC, segments_BT, drops):
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
    if drops is not None:
        weights = drop(drops, rate, weights.reshape(B, G, -1, T), 0).reshape(weights.shape)
    y = jnp.einsum("bgrts,bsgc->btgrc", weights.astype(q_BTHC.dtype), v_BSGC, preferred_element_type=jnp.float32)
    return y.astype(q_BTHC.dtype).reshape(B, T, H, C)


def cached_attention(q_BTHC: jax.Array, k_BGSC: jax.Array, v_BGSC: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Attends a few new queries to a cache of keys and values; `visible_BTS` says which slots each may see.

    A kernel takes a single one; it reads visible slots only, and each once. Its gradient is that of the reference.
    """
    if q_BTHC.shape[1] == 1 and kernels.usable_for_a_cache(k_BGSC.dtype, q_BTHC.shape[3]):
        return _cached_by_kernel(q_BTHC, k_BGSC, v_BGSC, visible_BTS)
    return cached_attention_reference(q_BTHC, k_BGSC, v_BGSC, visible_BTS)


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


def cached_attention_reference(q_BTHC, k_BGSC, v_BGSC, visible_BTS) -> jax.Array:
    """What `cached_attention` computes, by XLA's products."""
    B, T, H, C = q_BTHC.shape
    G, S = k_BGSC.shape[1:3]
    R = H // G
    q_BGRTC = q_BTHC.reshape(B, T, G, R, C).transpose(0, 2, 3, 1, 4)
    q_BGNC = q_BGRTC.reshape(B, G, R * T, C)
    if jax.default_backend() == "cpu":  # XLA would lay out a single sequence's keys and values anew for every token
        q_BGNC, k_BGSC, v_BGSC = (row_major(x) for x in (q_BGNC, k_BGSC, v_BGSC))
    scores = jnp.einsum("bgnc,bgsc->bgns", q_BGNC, k_BGSC, preferred_element_type=jnp.float32) * C**-0.5
    scores = jnp.where(visible_BTS[:, None, None], scores.reshape(B, G, R, T, S), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_BTHC.dtype).reshape(B, G, R * T, S)
    y_BGNC = jnp.einsum("bgns,bgsc->bgnc", weights, v_BGSC, preferred_element_type=jnp.float32)
    y_BTGRC = y_BGNC.astype(q_BTHC.dtype).reshape(B, G, R, T, C).transpose(0, 3, 1, 2, 4)
    return y_BTGRC.reshape(B, T, H, C)


@functools.cache
def cudnn_works(dtype, T: int, head_dim: int, window: int, masked: bool) -> bool:
    """Runs cuDNN's fused attention once on this GPU, forward and backward; where it fails, another form is used.

    Called while a step is traced, so all of it is computed apart from that.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return False
    try:
        with jax.ensure_compile_time_eval():
            x = jnp.ones((1, T, 1, head_dim), dtype)
            segments = jnp.zeros((1, T), jnp.int32) if masked else None
            y, derivative = jax.vjp(lambda x: _cudnn(window, x, x, x, segments, None), x)
            finite = jnp.isfinite(y) & jnp.isfinite(derivative(y)[0])
            return bool(jnp.all(finite))
    except Exception as error:  # whatever the driver or the library says, training can go on without it
        print(f"cuDNN attention is not available ({str(error).splitlines()[0]}); using another form")
        return False


def _cudnn(window, q_BTHC, k_BSGC, v_BSGC, segments_BT, _drops):
    mask = None if segments_BT is None else _same_segment(segments_BT)[:, None]
    before = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(
        q_BTHC, k_BSGC, v_BSGC, mask=mask, is_causal=True, local_window_size=before, implementation="cudnn"
    )


def _same_segment(segments_BT):
    return segments_BT[:, :, None] == segments_BT[:, None, :]
