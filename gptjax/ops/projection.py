"""Matmuls of decoding: they have few rows, so the time is that of reading the weights.

Shape suffixes: N rows, K contracted, F outputs; J stripe, G row of a stripe, see `single_row`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops import kernels
from gptjax.ops.matmul import dot, row_major
from gptjax.ops.single_row import pad_to_stripes, single_row_matmul, to_stripes

INT8_MAX = 127.0
LOW_STEPS = 254.0  # the second int8 of an activation has a 254 times smaller step, so that 127 is half a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A weight laid out for decoding."""

    w: jax.Array
    """`[F, K]`; or `[J, G, F]` for `single_row_matmul`; or `[P, S, W, L, I]` for `kernels.small_batch_matmul`."""
    scale_F: jax.Array | None
    """Quantisation step of each output's int8 weights; None for other dtypes."""
    outputs: int = dataclasses.field(metadata={"static": True})
    """F."""


def make_projection(
    w: jax.Array, dtype: Literal["float32", "bfloat16", "int8"], one_row: bool, outputs_first: bool = False
) -> Projection:
    """Lays out a matrix, `[K, F]` or `[F, K]` if `outputs_first`, for matmuls with one row or with several rows.

    The C++ kernel uses one layout for both. Weights of int8 have one scale for each output.
    """
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


def dequantized(projection: Projection, K: int) -> jax.Array:
    """Returns the float32 matrix `[K, F]` that `project` multiplies by."""
    w = projection.w
    if w.ndim == 5:
        P, S, W, L, numbers = w.shape
        w_KF = w.transpose(1, 2, 4, 0, 3).reshape(S * W * numbers, P * L)[:K, : projection.outputs]
    else:
        w_KF = w.reshape(-1, w.shape[-1])[:K] if w.ndim == 3 else w.T
    w_KF = w_KF.astype(jnp.float32)
    return w_KF if projection.scale_F is None else w_KF * projection.scale_F[None]


def project_reference(x: jax.Array, projection: Projection) -> jax.Array:
    """Computes `project` in float32; `project` differs by rounding."""
    return jnp.tensordot(x.astype(jnp.float32), dequantized(projection, x.shape[-1]), 1)


def project(x: jax.Array, projection: Projection) -> jax.Array:
    """Multiplies `x [..., K]`; returns float32 `[..., F]`.

    Without the C++ kernel, XLA's matmul is called in the layout that is fastest on a CPU (see `_weights_left`). With
    int8 weights, each row of activations becomes two int8 rows: multiples of a step, and fractions of a step. So only
    the weights are rounded to 8 bits, and two int8 rows take half the time of one float32 row.
    """
    x_NK, w = x.reshape(-1, x.shape[-1]), projection.w
    if w.ndim == 5:
        y_NF = kernels.small_batch_matmul(x_NK, w, projection.scale_F, projection.outputs)
        return y_NF.reshape(*x.shape[:-1], projection.outputs)
    if w.ndim == 3 and x_NK.shape[0] == 1:
        y_NF = single_row_matmul(x_NK[0], w)[None]
    elif w.ndim == 3:  # a prompt
        y_NF = _matmul("nk,kf->nf", pad_to_stripes(x_NK, w), w.reshape(-1, w.shape[-1]))
    else:
        y_NF = _matmul("nk,fk->nf", x_NK, w)
    if projection.scale_F is not None:
        y_NF = y_NF * projection.scale_F[None]
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
    """Whether XLA:CPU is faster with the weights as the left operand, which it packs less (`bench/matmuls.py`)."""
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
