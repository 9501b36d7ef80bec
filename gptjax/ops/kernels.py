"""Calls of the C++ kernels in `machine/native`.

Shape suffixes: N rows, K contracted, F outputs; B batch, T position, G key heads, H query heads, E = H / G + 2 (the
queries, the key and the value of a key head), S slot of a cache, C head_dim. Of weights packed for a small batch: P
panel, S step, W word, L output of a panel, I number within a word.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.machine.native import build
from gptjax.machine.platform import target_platform
from gptjax.ops.axes import sharded_by_compiler

BLOCK_SIZE = 32
"""Rows and columns of the blocks that kernels compute."""
ROW_BLOCK = 128
"""Largest number of rows in a task of the MLP's gradient."""
COLUMNS_AT_ONCE = 1024
"""Columns of the vocabulary whose logits are in memory at a time."""
GRADIENT_ROWS = 1024
"""Rows that a weight's gradient contracts at a time, so that the packed operands stay in a cache."""
PLANES = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float32): 3}
"""Number of bfloat16 terms that represent one value in a kernel's matmul."""
WORDS = 16
"""Words of 32 bits for each output in a step of packed weights."""
NO_VECTOR = np.zeros(0, np.float32)
NO_SEGMENTS = np.zeros((0,), np.int32)


def usable(dtype: jax.typing.DTypeLike, *sizes: int) -> bool:
    """Whether the kernels support arrays of these sizes here; see `unsupported`."""
    return unsupported(dtype, *sizes) is None


def unsupported(dtype: jax.typing.DTypeLike, *sizes: int) -> str | None:
    """Returns why the kernels do not support arrays of these sizes here; None: they do."""
    if target_platform() != "cpu":
        return "needs a CPU"
    if jnp.dtype(dtype) not in PLANES:
        return f"{jnp.dtype(dtype)} is neither bfloat16 nor float32"
    if sharded_by_compiler():
        return "arrays are sharded over devices"
    if any(size % BLOCK_SIZE for size in sizes):
        return f"{next(size for size in sizes if size % BLOCK_SIZE)} is no multiple of {BLOCK_SIZE}"
    if not build.ready():
        return build.state()
    if jnp.dtype(dtype) != jnp.bfloat16 and not build.has_tiles():
        return "float32 needs AMX"
    return None


def linear(x_NK, w, bias_F, out_dtype, outputs_first: bool, residual_NF=None) -> jax.Array:
    """`residual + x w + bias`, `[N, F]`; `w` is `[K, F]`, or `[F, K]` if `outputs_first`."""
    F = w.shape[0] if outputs_first else w.shape[1]
    out = (_shape((x_NK.shape[0], F), out_dtype), _packed(x_NK, w.size))
    return _call("linear", out)(x_NK, w, _vector(bias_F), _vector(residual_NF), columns=outputs_first)[0]


def weight_gradient(x_NK: jax.Array, dy_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x^T dy`, `[K, F]`, and the sums of `dy` over rows, float32."""
    (N, K), F = x_NK.shape, dy_NF.shape[1]
    out = (_shape((K, F), jnp.float32), _shape((F,), jnp.float32), _packed(x_NK, min(N, GRADIENT_ROWS) * (K + F)))
    return _call("weight_gradient", out)(x_NK, dy_NF)[:2]


def mlp(x_ND, w_in_DF, b_in_F, w_out_DF, b_out_D, residual_ND=None) -> jax.Array:
    """`residual + gelu(x w_in + b_in) w_out^T + b_out`, `[N, D]` float32."""
    out = (_shape(x_ND.shape, jnp.float32), _packed(x_ND, 2 * w_in_DF.size))
    return _call("mlp", out)(x_ND, w_in_DF, _vector(b_in_F), w_out_DF, _vector(b_out_D), _vector(residual_ND))[0]


def mlp_gradient(x_ND, w_in_DF, b_in_F, w_out_DF, dy_ND) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of `x`, `w_in`, `b_in` and `w_out`; those of parameters are float32."""
    N, (D, F) = x_ND.shape[0], w_in_DF.shape
    rows = min(-(-N // ROW_BLOCK) * ROW_BLOCK, GRADIENT_ROWS)
    packed = _packed(x_ND, 3 * D * F + 2 * rows * (D + F))
    weight, bias = _shape((D, F), jnp.float32), _shape((F,), jnp.float32)
    call = _call("mlp_gradient", (_shape(x_ND.shape, x_ND.dtype), weight, bias, weight, packed))
    return call(x_ND, w_in_DF, _vector(b_in_F), w_out_DF, dy_ND)[:4]


def layer_norm(x_ND: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float, out_dtype) -> jax.Array:
    """Layer norm of float32 rows."""
    call = _call("layer_norm", _shape(x_ND.shape, out_dtype))
    return call(x_ND, _vector(scale_D), _vector(bias_D), epsilon=np.float32(epsilon))


def layer_norm_gradient(x_ND, scale_D, dy_ND, stream_ND, epsilon: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of rows, scale and bias, float32; `stream` (float32) is added to the gradient of the rows."""
    vector = _shape(scale_D.shape, jnp.float32)
    call = _call("layer_norm_gradient", (_shape(x_ND.shape, jnp.float32), vector, vector))
    return tuple(call(x_ND, _vector(scale_D), dy_ND, stream_ND, epsilon=np.float32(epsilon)))


def attention(qkv_BTGEC: jax.Array, segments_BT: jax.Array | None, window: int) -> tuple[jax.Array, jax.Array]:
    """Outputs `[B, T, H, C]`, and the logarithms of the sums of exponentials `[B, H, T]`, float32."""
    B, T, G, E, C = qkv_BTGEC.shape
    H = G * (E - 2)
    out = (_shape((B, T, H, C), qkv_BTGEC.dtype), _shape((B, H, T), jnp.float32))
    return _call("attention", out)(qkv_BTGEC, _segments(segments_BT), window=np.int64(window))


def attention_gradient(qkv_BTGEC, segments_BT, y_BTHC, log_sums_BHT, dy_BTHC, window: int) -> jax.Array:
    """The gradient of queries, keys and values, `[B, T, G, E, C]`."""
    call = _call("attention_gradient", _shape(qkv_BTGEC.shape, qkv_BTGEC.dtype))
    return call(qkv_BTGEC, _segments(segments_BT), y_BTHC, log_sums_BHT, dy_BTHC, window=np.int64(window))


def cross_entropy(x_ND, w_VD, targets_N, vocab_size: int, smoothing: float, z_loss: float) -> tuple[jax.Array, ...]:
    """For each row the log-normalizer, the target's logit and, if `smoothing` needs it, the sum of logits."""
    return _call("cross_entropy", _loss_outputs(x_ND, with_gradient=False))(
        x_ND, w_VD, targets_N, **_loss_attributes(vocab_size, smoothing, z_loss)
    )[:3]


def cross_entropy_gradient(
    x_ND, w_VD, targets_N, vocab_size: int, smoothing: float, z_loss: float
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """The results of `cross_entropy`, and the gradients of `x` and `w`, float32."""
    *parts, packed = _loss_outputs(x_ND, with_gradient=True)
    out = (*parts, _shape(x_ND.shape, jnp.float32), _shape(w_VD.shape, jnp.float32), packed)
    attributes = _loss_attributes(vocab_size, smoothing, z_loss)
    *parts, dx_ND, dw_VD, _ = _call("cross_entropy_gradient", out)(x_ND, w_VD, targets_N, **attributes)
    return tuple(parts), dx_ND, dw_VD


def _loss_outputs(x_ND, with_gradient):
    N, D = x_ND.shape
    size = COLUMNS_AT_ONCE * D
    if with_gradient:
        size += COLUMNS_AT_ONCE * D + N * D + N * COLUMNS_AT_ONCE
    return (*(_shape((N,), jnp.float32),) * 3, _packed(x_ND, size))


def _loss_attributes(vocab_size, smoothing, z_loss):
    return {"vocab_size": np.int64(vocab_size), "smoothing": np.float32(smoothing), "z_loss": np.float32(z_loss)}


def usable_for_small_batch(dtype: jax.typing.DTypeLike) -> bool:
    """Whether `pack_weights` and `small_batch_matmul` support weights of this dtype here, of any size."""
    if dtype not in (jnp.bfloat16, jnp.int8) or target_platform() != "cpu" or sharded_by_compiler():
        return False
    return build.ready()


def pack_weights(w_FK: jax.Array) -> jax.Array:
    """Packs bfloat16 or int8 weights for `small_batch_matmul`: `[P, S, W, L, I]`, both axes padded with zeros."""
    F, K = w_FK.shape
    numbers = 4 // w_FK.dtype.itemsize
    P, S = -(-F // BLOCK_SIZE), -(-K // (WORDS * numbers))
    w_FK = jnp.pad(w_FK, ((0, P * BLOCK_SIZE - F), (0, S * WORDS * numbers - K)))
    return _call("pack_weights", _shape((P, S, WORDS, BLOCK_SIZE, numbers), w_FK.dtype))(w_FK)


def small_batch_matmul(x_NK: jax.Array, w_PSWLI: jax.Array, scale_F: jax.Array | None, F: int) -> jax.Array:
    """`x w`, `[N, F]`, float32; multiplied by `scale` if the weights are int8."""
    _, S, W, _, numbers = w_PSWLI.shape
    N, K = x_NK.shape
    x_NK = jnp.pad(x_NK.astype(jnp.float32), ((0, 0), (0, S * W * numbers - K)))
    rows = BLOCK_SIZE if w_PSWLI.dtype == jnp.bfloat16 else BLOCK_SIZE // 2  # two packed rows of int8 represent one row
    left = _shape((-(-N // rows), S, BLOCK_SIZE, W, numbers), w_PSWLI.dtype)
    out = (_shape((N, F), jnp.float32), left, _shape((N,), jnp.float32))
    return _call("small_batch_matmul", out)(x_NK, w_PSWLI, _vector(scale_F))[0]


def usable_for_a_cache(dtype: jax.typing.DTypeLike, head_dim: int) -> bool:
    """Whether `cached_attention` supports keys and values of this dtype and size here."""
    if (
        jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32)
        or head_dim % 16
        or target_platform() != "cpu"
        or sharded_by_compiler()
    ):
        return False
    return build.ready()


def cached_attention(q_BHC: jax.Array, k_BGSC: jax.Array, v_BGSC: jax.Array, visible_BS: jax.Array) -> jax.Array:
    """Attends one new position of each sequence to its visible positions; float32, `[B, H, C]`."""
    return _call("cached_attention", _shape(q_BHC.shape, jnp.float32))(
        q_BHC.astype(jnp.float32), k_BGSC, v_BGSC, visible_BS
    )


def _call(name, out):
    return jax.ffi.ffi_call(f"gptjax_{name}", out, vmap_method="sequential")


def _shape(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def _packed(x, size):
    """Shape of the workspace: an XLA buffer into which a kernel packs its operands, for activations of x's dtype."""
    return _shape((PLANES[x.dtype] * size,), jnp.bfloat16)


def _vector(x):
    return NO_VECTOR if x is None else x.astype(jnp.float32).reshape(-1)


def _segments(segments_BT):
    return NO_SEGMENTS if segments_BT is None else segments_BT.astype(jnp.int32)
