"""Matrix products of decoding: few rows, so that reading the weights sets the pace.

Shape suffixes: N rows, K contracted, F outputs.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gptjax.ops.matmul import dot, row_major

INT8_MAX = 127.0
LOW_STEPS = 254.0  # the second int8 of an activation counts in 254ths of the first one's step: half a step is 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A weight laid out for decoding."""

    w_FK: jax.Array
    scale_F: jax.Array | None
    """Of int8 weights: what a step of each output's weights is worth."""


def make_projection(w_KF: jax.Array, dtype: Literal["float32", "bfloat16", "int8"]) -> Projection:
    """Lays out a matrix; each output of int8 has a scale of its own."""
    w_FK = w_KF.T
    if dtype != "int8":
        return Projection(w_FK.astype(dtype), None)
    w_FK = w_FK.astype(jnp.float32)
    scale_F = jnp.maximum(jnp.max(jnp.abs(w_FK), axis=1) / INT8_MAX, jnp.finfo(jnp.float32).tiny)
    return Projection(jnp.round(w_FK / scale_F[:, None]).astype(jnp.int8), scale_F)


def dequantized(projection: Projection) -> jax.Array:
    """The float32 matrix `[K, F]` that `project` multiplies by."""
    w_FK = projection.w_FK.astype(jnp.float32)
    return (w_FK if projection.scale_F is None else w_FK * projection.scale_F[:, None]).T


def project_reference(x: jax.Array, projection: Projection) -> jax.Array:
    """What `project` computes, up to rounding."""
    return jnp.tensordot(x.astype(jnp.float32), dequantized(projection), 1)


def project(x: jax.Array, projection: Projection) -> jax.Array:
    """Multiplies `x [..., K]`; returns float32 `[..., F]`.

    Forms were chosen by time on a CPU. Some rows want the weights as the left operand, which XLA packs less, see
    `_weights_left`. A single row of bfloat16 or int8 takes XLA many times as long as two rows do, so there are always
    two. Two int8 rows take half as long as one float32 row; they hold one row of activations, in steps and in
    fractions of a step, so only the weights are rounded to 8 bits.
    """
    x_NK = x.reshape(-1, x.shape[-1])
    on_cpu = jax.default_backend() == "cpu"
    if projection.scale_F is None:
        y_NF = _float_product(x_NK, projection.w_FK, on_cpu)
    elif on_cpu:
        y_NF = _int8_product(x_NK, projection.w_FK) * projection.scale_F[None]
    else:
        y_NF = dot("nk,fk->nf", x_NK, projection.w_FK.astype(x.dtype), jnp.float32) * projection.scale_F[None]
    return y_NF.reshape(*x.shape[:-1], -1)


def _float_product(x_NK, w_FK, on_cpu):
    rows = x_NK.shape[0]
    x_NK = x_NK.astype(w_FK.dtype)
    if on_cpu and _weights_left(rows, w_FK.dtype):
        return row_major(dot("fk,nk->fn", w_FK, x_NK, jnp.float32)).T  # pinned: XLA would turn the product around again
    if on_cpu and rows == 1 and w_FK.dtype == jnp.bfloat16:
        x_NK = jnp.concatenate([x_NK, x_NK])
    return dot("nk,fk->nf", x_NK, w_FK, jnp.float32)[:rows]


def _weights_left(rows: int, dtype) -> bool:
    """Whether the weights on the left are faster, by `bench/products.py`: 358 and 603 us for 2 rows of float32, 901 and
    1,299 for 32; for bfloat16 420 and 382 us for 8 rows, 459 and 482 for 16. From 128 rows on they are not.
    """
    return (2 if dtype == jnp.float32 else 16) <= rows < 128


def _int8_product(x_NK, w_FK):
    rows = x_NK.shape[0]
    x_NK = x_NK.astype(jnp.float32)
    step_N1 = jnp.max(jnp.abs(x_NK), axis=1, keepdims=True) / INT8_MAX
    step_N1 = jnp.maximum(step_N1, jnp.finfo(jnp.float32).tiny)
    high_NK = jnp.round(x_NK / step_N1)
    low_NK = jnp.round((x_NK / step_N1 - high_NK) * LOW_STEPS)
    both = jnp.concatenate([high_NK, low_NK]).astype(jnp.int8)
    sums = jnp.einsum("nk,fk->nf", both, w_FK, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (sums[:rows] + sums[rows:] / LOW_STEPS) * step_N1
