"""Matrix products of decoding: few rows, so that reading the weights sets the pace.

Shape suffixes: N rows, K contracted, F outputs; J stripe, G row of a stripe, see `single_row`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops import kernels
from gptjax.ops.matmul import dot, row_major
from gptjax.ops.single_row import padded, single_row_product, striped

INT8_MAX = 127.0
LOW_STEPS = 254.0  # the second int8 of an activation counts in 254ths of the first one's step: half a step is 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A weight laid out for decoding."""

    w: jax.Array
    """`[F, K]`, or `[J, G, F]` to be multiplied by one row at a time, or `[P, S, W, L, I]` for `kernels.few_rows`."""
    scale_F: jax.Array | None
    """Of int8 weights: what a step of each output's weights is worth."""
    outputs: int = dataclasses.field(metadata={"static": True})
    """F."""


def make_projection(
    w: jax.Array, dtype: Literal["float32", "bfloat16", "int8"], one_row: bool, outputs_first: bool = False
) -> Projection:
    """Lays out a matrix, `[K, F]` or, where `outputs_first`, `[F, K]`, for products of one row or of several.

    Kernels, where there are any, take the same layout for both. Each output of int8 has a scale of its own.
    """
    scale_F, outputs = None, w.shape[0 if outputs_first else 1]
    if dtype == "int8":
        w = w.astype(jnp.float32)
        contracted = 1 if outputs_first else 0
        scale = jnp.max(jnp.abs(w), axis=contracted, keepdims=True) / INT8_MAX
        scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
        w, scale_F = jnp.round(w / scale), jnp.squeeze(scale, contracted)
    # Pinned, so that what is turned around is small already: 22 ms instead of 115 for twelve matrices of 768 x 3072.
    w = row_major(w.astype(dtype))
    by_kernel = kernels.usable_for_few_rows(w.dtype)
    # float32: the library is as fast
    in_stripes = target_platform() == "cpu" and one_row and dtype != "float32" and not by_kernel
    if outputs_first == in_stripes:
        w = row_major(w.T)
    layout = kernels.pack_weights if by_kernel else striped if in_stripes else lambda w: w
    return Projection(layout(w), scale_F, outputs)


def dequantized(projection: Projection, K: int) -> jax.Array:
    """The float32 matrix `[K, F]` that `project` multiplies by."""
    w = projection.w
    if w.ndim == 5:
        P, S, W, L, numbers = w.shape
        w_KF = w.transpose(1, 2, 4, 0, 3).reshape(S * W * numbers, P * L)[:K, : projection.outputs]
    else:
        w_KF = w.reshape(-1, w.shape[-1])[:K] if w.ndim == 3 else w.T
    w_KF = w_KF.astype(jnp.float32)
    return w_KF if projection.scale_F is None else w_KF * projection.scale_F[None]


def project_reference(x: jax.Array, projection: Projection) -> jax.Array:
    """What `project` computes, up to rounding."""
    return jnp.tensordot(x.astype(jnp.float32), dequantized(projection, x.shape[-1]), 1)


def project(x: jax.Array, projection: Projection) -> jax.Array:
    """Multiplies `x [..., K]`; returns float32 `[..., F]`.

    Where there are no kernels, forms were chosen by time on a CPU. Some rows want the weights as the left operand,
    which XLA packs less, see `_weights_left`. Two int8 rows take half as long as one float32 row; they hold one row of
    activations, in steps and in fractions of a step, so only the weights are rounded to 8 bits.
    """
    x_NK, w = x.reshape(-1, x.shape[-1]), projection.w
    if w.ndim == 5:
        y_NF = kernels.few_rows(x_NK, w, projection.scale_F, projection.outputs)
        return y_NF.reshape(*x.shape[:-1], projection.outputs)
    if w.ndim == 3 and x_NK.shape[0] == 1:
        y_NF = single_row_product(x_NK[0], w)[None]
    elif w.ndim == 3:  # a prompt
        y_NF = _product("nk,kf->nf", padded(x_NK, w), w.reshape(-1, w.shape[-1]))
    else:
        y_NF = _product("nk,fk->nf", x_NK, w)
    if projection.scale_F is not None:
        y_NF = y_NF * projection.scale_F[None]
    return y_NF.reshape(*x.shape[:-1], -1)


def _product(spec, x_NK, w):
    on_cpu = target_platform() == "cpu"
    if w.dtype == jnp.int8:
        return _int8_product(spec, x_NK, w) if on_cpu else dot(spec, x_NK, w.astype(x_NK.dtype), jnp.float32)
    x_NK = x_NK.astype(w.dtype)
    if on_cpu and spec == "nk,fk->nf" and _weights_left(x_NK.shape[0], w.dtype):
        return row_major(dot("fk,nk->fn", w, x_NK, jnp.float32)).T  # pinned: XLA would turn the product around again
    return dot(spec, x_NK, w, jnp.float32)


def _weights_left(rows: int, dtype) -> bool:
    """Whether the weights on the left are faster, by `bench/products.py`: 358 and 603 us for 2 rows of float32, 901 and
    1,299 for 32; for bfloat16 420 and 382 us for 8 rows, 459 and 482 for 16. From 128 rows on they are not.
    """
    return (2 if dtype == jnp.float32 else 16) <= rows < 128


def _int8_product(spec, x_NK, w):
    rows = x_NK.shape[0]
    x_NK = x_NK.astype(jnp.float32)
    step_N1 = jnp.max(jnp.abs(x_NK), axis=1, keepdims=True) / INT8_MAX
    step_N1 = jnp.maximum(step_N1, jnp.finfo(jnp.float32).tiny)
    high_NK = jnp.round(x_NK / step_N1)
    low_NK = jnp.round((x_NK / step_N1 - high_NK) * LOW_STEPS)
    both = jnp.concatenate([high_NK, low_NK]).astype(jnp.int8)
    sums = jnp.einsum(spec, both, w, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (sums[:rows] + sums[rows:] / LOW_STEPS) * step_N1
