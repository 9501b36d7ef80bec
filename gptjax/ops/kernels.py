"""Calls of the kernels in `gptjax/native`, for a CPU. The functions that use them stand beside their references.

Shape suffixes: N rows, K contracted, F outputs; B batch, T position, S slot of a cache, G key heads, H query heads,
E = H / G + 2 (the queries, the key and the value of a key head), C head_dim. Weights laid out for a few rows: P panel,
S step, W word, L output of a panel, I number of a word.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.native import build
from gptjax.ops.axes import compiler_cuts
from gptjax.ops.platform import on_cpu

SIDE = 32
"""Kernels work on blocks of so many rows and columns."""
SUMMED_AT_ONCE = 1024
"""Rows that `weight_gradient` lays out at a time; `kSummedAtOnce` in `linear.h`."""
WORDS = 16
"""Words of 32 bits of a step of laid out weights, for each output."""
NO_BIAS = np.zeros(0, np.float32)
NO_SEGMENTS = np.zeros((0,), np.int32)


def usable(dtype: jax.typing.DTypeLike, *sizes: int) -> bool:
    """Whether kernels take arrays of these sizes here; not where the compiler cuts them over devices."""
    if dtype != jnp.bfloat16 or not on_cpu() or compiler_cuts():
        return False
    return all(size % SIDE == 0 for size in sizes) and build.ready()


def usable_for_few_rows(dtype: jax.typing.DTypeLike) -> bool:
    """Whether `laid_out` and `few_rows` can be called here for weights of this dtype, of whatever size."""
    if dtype not in (jnp.bfloat16, jnp.int8) or not on_cpu() or compiler_cuts():
        return False
    return build.ready()


def laid_out(w_FK: jax.Array) -> jax.Array:
    """Weights of bfloat16 or int8 as `few_rows` reads them, `[P, S, W, L, I]`, with zeros behind both axes."""
    F, K = w_FK.shape
    numbers = 4 // w_FK.dtype.itemsize
    P, S = -(-F // SIDE), -(-K // (WORDS * numbers))
    w_FK = jnp.pad(w_FK, ((0, P * SIDE - F), (0, S * WORDS * numbers - K)))
    return _call("lay_out", _like((P, S, WORDS, SIDE, numbers), w_FK.dtype))(w_FK)


def few_rows(x_NK: jax.Array, w_PSWLI: jax.Array, scale_F: jax.Array | None, F: int) -> jax.Array:
    """`x w`, `[N, F]`, float32; times `scale` where weights are int8."""
    _, S, W, _, numbers = w_PSWLI.shape
    N, K = x_NK.shape
    x_NK = jnp.pad(x_NK.astype(jnp.float32), ((0, 0), (0, S * W * numbers - K)))
    rows = SIDE if w_PSWLI.dtype == jnp.bfloat16 else SIDE // 2  # each is held in two of int8
    left = _like((-(-N // rows), S, SIDE, W, numbers), w_PSWLI.dtype)
    out = (_like((N, F), jnp.float32), left, _like((N,), jnp.float32))
    return _call("few_rows", out)(x_NK, w_PSWLI, _bias(scale_F))[0]


def usable_for_a_cache(dtype: jax.typing.DTypeLike, head_dim: int) -> bool:
    """Whether `cached_attention` takes keys and values of this dtype and size here."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32) or head_dim % 16 or not on_cpu() or compiler_cuts():
        return False
    return build.ready()


def cached_attention(q_BHC: jax.Array, k_BGSC: jax.Array, v_BGSC: jax.Array, visible_BS: jax.Array) -> jax.Array:
    """Attends one new position of each sequence to those that it sees; float32, `[B, H, C]`."""
    return _call("cached_attention", _like(q_BHC.shape, jnp.float32))(
        q_BHC.astype(jnp.float32), k_BGSC, v_BGSC, visible_BS
    )


def linear(x_NK: jax.Array, w: jax.Array, bias_F: jax.Array | None, out_dtype, outputs_first: bool) -> jax.Array:
    """`x w + bias`, `[N, F]`; `w` is `[K, F]` or, where `outputs_first`, `[F, K]`, in float32 or bfloat16."""
    F = w.shape[0] if outputs_first else w.shape[1]
    out = (_like((x_NK.shape[0], F), out_dtype), _packed(w.size))
    return _call("linear", out)(x_NK, w, _bias(bias_F), columns=outputs_first)[0]


def linear_gelu(x_NK: jax.Array, w_KF: jax.Array, bias_F: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`x w + bias`, and GELU of it; `[N, F]` each."""
    out = _like((x_NK.shape[0], w_KF.shape[1]))
    return _call("linear_gelu", (out, out, _packed(w_KF.size)))(x_NK, w_KF, _bias(bias_F))[:2]


def linear_gelu_gradient(dy_NK: jax.Array, w_KF: jax.Array, h_NF: jax.Array) -> jax.Array:
    """`dy w` times the slope of GELU at `h`, `[N, F]`."""
    return _call("linear_gelu_gradient", (_like(h_NF.shape), _packed(w_KF.size)))(dy_NK, w_KF, h_NF)[0]


def weight_gradient(x_NK: jax.Array, dy_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x^T dy`, `[K, F]`, and the sums of `dy` over rows, float32."""
    (N, K), F = x_NK.shape, dy_NF.shape[1]
    out = (_like((K, F), jnp.float32), _like((F,), jnp.float32), _packed(min(N, SUMMED_AT_ONCE) * (K + F)))
    return _call("weight_gradient", out)(x_NK, dy_NF)[:2]


def attention(qkv_BTGEC: jax.Array, segments_BT: jax.Array | None, window: int) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, H, C]`, and the logarithms of the sums of exponentials `[B, H, T]`, float32."""
    B, T, G, E, C = qkv_BTGEC.shape
    H = G * (E - 2)
    out = (_like((B, T, H, C)), _like((B, H, T), jnp.float32))
    return _call("attention", out)(qkv_BTGEC, _segments(segments_BT), window=np.int64(window))


def attention_gradient(qkv_BTGEC, segments_BT, y_BTHC, log_sums_BHT, dy_BTHC, window: int) -> jax.Array:
    """The gradient of queries, keys and values, `[B, T, G, E, C]`."""
    call = _call("attention_gradient", _like(qkv_BTGEC.shape))
    return call(qkv_BTGEC, _segments(segments_BT), y_BTHC, log_sums_BHT, dy_BTHC, window=np.int64(window))


def _call(name, out):
    return jax.ffi.ffi_call(f"gptjax_{name}", out, vmap_method="sequential")


def _like(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _packed(size):
    """Room for operands as a kernel lays them out, among XLA's own buffers."""
    return _like((size,))


def _bias(bias_F):
    return NO_BIAS if bias_F is None else bias_F.astype(jnp.float32).reshape(-1)


def _segments(segments_BT):
    return NO_SEGMENTS if segments_BT is None else segments_BT.astype(jnp.int32)
