"""Matrix products of decoding: few rows, so that reading the weights sets the pace.

Shape suffixes: N rows, K contracted, F outputs.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gptjax.ops.matmul import dot

INT8_MAX = 127.0
LOW_STEPS = 254.0  # the second int8 of an activation counts in 254ths of the first one's step: half a step is 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A weight laid out for decoding."""

    w: jax.Array
    """`[F, K]` where `outputs_first`, else `[K, F]`."""
    scale_F: jax.Array | None
    """Of int8 weights: what a step of each output's weights is worth."""
    outputs_first: bool = dataclasses.field(metadata={"static": True})


def make_projection(w: jax.Array, dtype: Literal["float32", "bfloat16", "int8"], outputs_first: bool) -> Projection:
    """Lays out `w [K, F]`. int8 is always stored with outputs first, each output with a scale of its own."""
    if dtype != "int8":
        w = w.astype(dtype)
        return Projection(w.T if outputs_first else w, None, outputs_first)
    w_FK = w.T.astype(jnp.float32)
    scale_F = jnp.maximum(jnp.max(jnp.abs(w_FK), axis=1) / INT8_MAX, jnp.finfo(jnp.float32).tiny)
    return Projection(jnp.round(w_FK / scale_F[:, None]).astype(jnp.int8), scale_F, True)


def dequantized(projection: Projection) -> jax.Array:
    """The float32 matrix `[K, F]` that `project` multiplies by."""
    w = projection.w.astype(jnp.float32)
    if projection.scale_F is not None:
        w = w * projection.scale_F[:, None]
    return w.T if projection.outputs_first else w


def project_reference(x: jax.Array, projection: Projection) -> jax.Array:
    """What `project` computes, up to rounding."""
    return jnp.tensordot(x.astype(jnp.float32), dequantized(projection), 1)


def project(x: jax.Array, projection: Projection) -> jax.Array:
    """Multiplies `x [..., K]`; returns float32 `[..., F]`.

    Forms were chosen by time on a CPU. A single row of bfloat16 or int8 takes XLA many times as long as two rows do, so
    there are always two. Two int8 rows take half as long as one float32 row; they hold one row of activations, in steps
    and in fractions of a step, so only the weights are rounded to 8 bits.
    """
    x_NK = x.reshape(-1, x.shape[-1])
    on_cpu = jax.default_backend() == "cpu"
    if projection.scale_F is None:
        y_NF = _float_product(x_NK, projection, on_cpu)
    elif on_cpu:
        y_NF = _int8_product(x_NK, projection) * projection.scale_F[None]
    else:
        y_NF = dot("nk,fk->nf", x_NK, projection.w.astype(x.dtype), jnp.float32) * projection.scale_F[None]
    return y_NF.reshape(*x.shape[:-1], -1)


def _float_product(x_NK, projection, on_cpu):
    w, rows = projection.w, x_NK.shape[0]
    x_NK = x_NK.astype(w.dtype)
    if on_cpu and rows == 1 and w.dtype == jnp.bfloat16:
        x_NK = jnp.concatenate([x_NK, x_NK])
    spec = "nk,fk->nf" if projection.outputs_first else "nk,kf->nf"
    return dot(spec, x_NK, w, jnp.float32)[:rows]


def _int8_product(x_NK, projection):
    rows = x_NK.shape[0]
    x_NK = x_NK.astype(jnp.float32)
    step_N1 = jnp.max(jnp.abs(x_NK), axis=1, keepdims=True) / INT8_MAX
    step_N1 = jnp.maximum(step_N1, jnp.finfo(jnp.float32).tiny)
    high_NK = jnp.round(x_NK / step_N1)
    low_NK = jnp.round((x_NK / step_N1 - high_NK) * LOW_STEPS)
    both = jnp.concatenate([high_NK, low_NK]).astype(jnp.int8)
    sums = jnp.einsum("nk,fk->nf", both, projection.w, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (sums[:rows] + sums[rows:] / LOW_STEPS) * step_N1
