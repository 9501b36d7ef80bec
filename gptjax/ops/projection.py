"""Matmuls of decoding. They have few rows, so they are limited by the memory bandwidth of reading the weights.

Shape suffixes: N rows, K contracted, F outputs; J stripe, G row of a stripe, see `single_row`. Of 4-bit weights: J
group of `INT4_GROUP` contracted numbers, I a number of half a group.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops import kernels
from gptjax.ops.matmul import dot, row_major
from gptjax.ops.single_row import pad_to_stripes, single_row_matmul, to_stripes

WeightDtype = Literal["float32", "bfloat16", "int8", "int4"]
INT8_MAX = 127.0
INT4_GROUP = 32
"""Contracted numbers of 4-bit weights that share a scale."""
INT4_SCALES = (1.0, 0.94, 0.88, 0.82)
"""Scales that are tried for each group, as shares of the one that represents its largest number exactly. The one with
the smallest squared error is used."""
LOW_STEPS = 254.0  # the step of an activation's second int8 is 254 times smaller, so that 127 of them are half a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A weight in its layout for decoding."""

    w: jax.Array
    """`[F, K]`; or `[J, G, F]` for `single_row_matmul`; or `[P, S, W, L, I]` for `kernels.small_batch_matmul`; or uint8
    `[I, J, F]` with two 4-bit numbers in a byte, number I of a group in the lower half and I + 16 in the upper one."""
    scale: jax.Array | None
    """Quantisation steps: `[F]` of int8, `[J, F]` of 4-bit weights; None for other dtypes."""
    outputs: int = dataclasses.field(metadata={"static": True})
    """F."""


def make_projection(w: jax.Array, dtype: WeightDtype, one_row: bool, outputs_first: bool = False) -> Projection:
    """Converts a matrix, `[K, F]` or `[F, K]` if `outputs_first`, to its layout for one row or for several rows.

    The C++ kernel uses one layout for both, and so do 4-bit weights. Weights of int8 have one scale for each output.
    """
    if dtype == "int4":
        return _int4_projection(w.T if outputs_first else w)
    scale_F, outputs = None, w.shape[0 if outputs_first else 1]
    if dtype == "int8":
        w = w.astype(jnp.float32)
        contracted = 1 if outputs_first else 0
        scale = jnp.max(jnp.abs(w), axis=contracted, keepdims=True) / INT8_MAX
        scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
        w, scale_F = jnp.round(w / scale), jnp.squeeze(scale, contracted)
    # The layout constraint makes XLA cast before it transposes, which is five times faster.
    w = row_major(w.astype(dtype))
    by_kernel = kernels.usable_for_small_batch(w.dtype)
    # In float32 the library is as fast as stripes.
    in_stripes = target_platform() == "cpu" and one_row and dtype != "float32" and not by_kernel
    if outputs_first == in_stripes:
        w = row_major(w.T)
    layout = kernels.pack_weights if by_kernel else to_stripes if in_stripes else lambda w: w
    return Projection(layout(w), scale_F, outputs)


@jax.jit
def _int4_projection(w_KF: jax.Array) -> Projection:
    """Rounds each group of `INT4_GROUP` weights of an output to 16 steps, from -8 to 7.

    The number with the largest magnitude becomes -8 or a little more; scales are stored as bfloat16. This is Q4_0 of
    llama.cpp, except that several scales are tried.
    """
    K, F = w_KF.shape
    w_KF = jnp.pad(w_KF.astype(jnp.float32), ((0, -K % INT4_GROUP), (0, 0)))
    w_JGF = w_KF.reshape(-1, INT4_GROUP, F)
    largest_J1F = jnp.take_along_axis(w_JGF, jnp.argmax(jnp.abs(w_JGF), axis=1, keepdims=True), axis=1)

    def rounded(share: float) -> tuple[jax.Array, jax.Array, jax.Array]:
        scale_J1F = (largest_J1F * (share / -8)).astype(jnp.bfloat16)
        step_J1F = jnp.where(scale_J1F == 0, 1, scale_J1F).astype(jnp.float32)
        q_JGF = jnp.clip(jnp.round(w_JGF / step_J1F), -8, 7)
        return q_JGF, scale_J1F, jnp.sum((q_JGF * step_J1F - w_JGF) ** 2, axis=1, keepdims=True)

    q_JGF, scale_J1F, error_J1F = rounded(INT4_SCALES[0])
    for share in INT4_SCALES[1:]:
        other = rounded(share)
        better_J1F = other[2] < error_J1F
        q_JGF, scale_J1F, error_J1F = (
            jnp.where(better_J1F, new, old) for new, old in zip(other, (q_JGF, scale_J1F, error_J1F), strict=True)
        )
    q_JGF = (q_JGF + 8).astype(jnp.uint8)
    half = INT4_GROUP // 2
    packed_JIF = q_JGF[:, :half] | (q_JGF[:, half:] << 4)
    return Projection(packed_JIF.transpose(1, 0, 2), scale_J1F[:, 0], F)


def _int4_halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers in the lower and the upper halves of bytes, float32."""
    bytes_ = packed.astype(jnp.int32)
    return ((bytes_ & 15) - 8).astype(jnp.float32), ((bytes_ >> 4) - 8).astype(jnp.float32)


def _int4_matrix(projection: Projection, K: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrix `[K, F]` of 4-bit weights."""
    assert projection.scale is not None
    scale_JF = projection.scale.astype(jnp.float32)
    w_GJF = jnp.concatenate(_int4_halves(projection.w)) * scale_JF[None]
    return w_GJF.astype(dtype).transpose(1, 0, 2).reshape(-1, projection.outputs)[:K]


def _int4_single_row(x_K: jax.Array, projection: Projection) -> jax.Array:
    """Multiplies a row by 4-bit weights in one loop that unpacks them as it reads them, see `single_row_matmul`."""
    assert projection.scale is not None
    half, J, _ = projection.w.shape
    x_JG = jnp.pad(x_K.astype(jnp.float32), (0, J * INT4_GROUP - x_K.shape[0])).reshape(J, INT4_GROUP)
    x_JG, w_IJF, scale_JF = jax.lax.optimization_barrier((x_JG, projection.w, projection.scale))
    sums_JF = jnp.zeros(())
    for i in range(half):
        low_JF, high_JF = _int4_halves(w_IJF[i])
        sums_JF = sums_JF + x_JG[:, i, None] * low_JF + x_JG[:, half + i, None] * high_JF
    return jnp.ones(J) @ (sums_JF * scale_JF.astype(jnp.float32))


def dequantized(projection: Projection, K: int) -> jax.Array:
    """Returns the float32 matrix `[K, F]` that `project` multiplies by."""
    w = projection.w
    if w.dtype == jnp.uint8:
        return _int4_matrix(projection, K, jnp.float32)
    if w.ndim == 5:
        P, S, W, L, numbers = w.shape
        w_KF = w.transpose(1, 2, 4, 0, 3).reshape(S * W * numbers, P * L)[:K, : projection.outputs]
    else:
        w_KF = w.reshape(-1, w.shape[-1])[:K] if w.ndim == 3 else w.T
    w_KF = w_KF.astype(jnp.float32)
    return w_KF if projection.scale is None else w_KF * projection.scale[None]


def project_reference(x: jax.Array, projection: Projection) -> jax.Array:
    """Computes `project` in float32; `project` differs by rounding."""
    return jnp.tensordot(x.astype(jnp.float32), dequantized(projection, x.shape[-1]), 1)


def project(x: jax.Array, projection: Projection) -> jax.Array:
    """Multiplies `x [..., K]`; returns float32 `[..., F]`.

    Without the C++ kernel, XLA's matmul is called in the layout that is fastest on a CPU (see `_weights_left`). With
    int8 weights, each row of activations becomes two int8 rows: multiples of a step, and fractions of a step. So only
    the weights are rounded to 8 bits, and two int8 rows take half the time of one float32 row. 4-bit weights are
    unpacked in each matmul: in the loop of a single row on a CPU, and elsewhere to a matrix of the dtype of `x`.
    """
    x_NK, w = x.reshape(-1, x.shape[-1]), projection.w
    if w.dtype == jnp.uint8:
        if x_NK.shape[0] == 1 and target_platform() == "cpu":
            y_NF = _int4_single_row(x_NK[0], projection)[None]
        else:
            y_NF = dot("nk,kf->nf", x_NK, _int4_matrix(projection, x_NK.shape[1], x_NK.dtype), jnp.float32)
        return y_NF.reshape(*x.shape[:-1], projection.outputs)
    if w.ndim == 5:
        y_NF = kernels.small_batch_matmul(x_NK, w, projection.scale, projection.outputs)
        return y_NF.reshape(*x.shape[:-1], projection.outputs)
    if w.ndim == 3 and x_NK.shape[0] == 1:
        y_NF = single_row_matmul(x_NK[0], w)[None]
    elif w.ndim == 3:  # a prompt
        y_NF = _matmul("nk,kf->nf", pad_to_stripes(x_NK, w), w.reshape(-1, w.shape[-1]))
    else:
        y_NF = _matmul("nk,fk->nf", x_NK, w)
    if projection.scale is not None:
        y_NF = y_NF * projection.scale[None]
    return y_NF.reshape(*x.shape[:-1], -1)


def _matmul(spec, x_NK, w):
    on_cpu = target_platform() == "cpu"
    if w.dtype == jnp.int8:
        return _int8_matmul(spec, x_NK, w) if on_cpu else dot(spec, x_NK, w.astype(x_NK.dtype), jnp.float32)
    x_NK = x_NK.astype(w.dtype)
    if on_cpu and spec == "nk,fk->nf" and _weights_left(x_NK.shape[0], w.dtype):
        # Without the layout constraint XLA would swap the operands back.
        return row_major(dot("fk,nk->fn", w, x_NK, jnp.float32)).T
    return dot(spec, x_NK, w, jnp.float32)


def _weights_left(rows: int, dtype) -> bool:
    """Whether XLA:CPU is faster with the weights as the left operand, which it packs less (`bench/matmuls.py`).

    Used only without the C++ kernels. Kept because it makes the matmuls of 32 rows a quarter faster
    (docs/experiments/decoding.md).
    """
    return (2 if dtype == jnp.float32 else 16) <= rows < 128


def _int8_matmul(spec, x_NK, w):
    rows = x_NK.shape[0]
    x_NK = x_NK.astype(jnp.float32)
    step_N1 = jnp.max(jnp.abs(x_NK), axis=1, keepdims=True) / INT8_MAX
    step_N1 = jnp.maximum(step_N1, jnp.finfo(jnp.float32).tiny)
    high_NK = jnp.round(x_NK / step_N1)
    low_NK = jnp.round((x_NK / step_N1 - high_NK) * LOW_STEPS)
    both = jnp.concatenate([high_NK, low_NK]).astype(jnp.int8)
    sums = jnp.einsum(spec, both, w, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (sums[:rows] + sums[rows:] / LOW_STEPS) * step_N1
