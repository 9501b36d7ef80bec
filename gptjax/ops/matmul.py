"""Matmuls with operands in the compute dtype, sums in float32, and a custom backward rule.

Shape suffixes: N rows (batch times positions; two axes where positions are sharded), K contracted, F outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from gptjax.machine.platform import target_platform
from gptjax.ops.axes import merge_leading_axes, sharded_by_compiler
from gptjax.ops.scheduling import optimization_barrier, recompute_in_backward


def matmul_reference(
    x: jax.Array, w: jax.Array, out_dtype: jax.typing.DTypeLike, outputs_first: bool = False
) -> jax.Array:
    """Computes `matmul` with `jnp.tensordot`; differentiated by JAX."""
    w = w.astype(x.dtype)
    y = jnp.tensordot(x, w.T if outputs_first else w, 1, preferred_element_type=jnp.float32)
    return y.astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, w: jax.Array, out_dtype: jax.typing.DTypeLike, outputs_first: bool = False) -> jax.Array:
    """Multiplies `x [..., K]` by `w [K, ...]`, or by `w [F, K]` if `outputs_first`; `w` is cast to `x.dtype`.

    Store a weight with its smaller dimension first: the backward pass then transposes only the narrower activations.

    The backward rule casts the cotangent to the dtype of `x`; JAX's own rule would multiply it in float32, which is
    several times slower. The gradient of `w` is rounded once, from the float32 sums to the dtype of `w`.
    """
    spec = "...k,fk->...f" if outputs_first else "...k,kf->...f"
    y = dot(spec, merge_leading_axes(x), as_matrix(w).astype(x.dtype), out_dtype)
    outputs = w.shape[:1] if outputs_first else w.shape[1:]
    return y.reshape(*x.shape[:-1], *outputs)


def _forward(x, w, out_dtype, outputs_first):
    return matmul(x, w, out_dtype, outputs_first), (x, w)


def _backward(out_dtype, outputs_first, saved, dy):
    x, w = saved
    x_NK = merge_leading_axes(x)
    dy_NF = dy.astype(x.dtype).reshape(*x_NK.shape[:-1], -1)
    spec = "...f,fk->...k" if outputs_first else "...f,kf->...k"
    dx_NK = dot(spec, dy_NF, recompute_in_backward(as_matrix(w), dy_NF).astype(x.dtype), x.dtype)
    dw = weight_gradient(dy_NF, x_NK, w.dtype) if outputs_first else weight_gradient(x_NK, dy_NF, w.dtype)
    return dx_NK.reshape(x.shape), dw.reshape(w.shape)


matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Adds `bias`, whose shape is that of the last axes of `x`, in the dtype of `x`; None adds nothing."""
    if bias is None:
        return x
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - bias.ndim) + bias.shape)


def _bias_backward(bias, dy):
    if bias is None:
        return dy, None
    # Needed on a GPU too: XLA would fuse the sum with the GELU before it and write parts of the GELU in float32.
    dy_NF = merge_leading_axes(dy.reshape(*dy.shape[: dy.ndim - bias.ndim], bias.size))
    (dy_NF,) = optimization_barrier(dy_NF, on=("cpu", "gpu"))
    dbias = sum_rows(dy_NF)
    return dy, dbias.astype(bias.dtype).reshape(bias.shape)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _bias_backward)


def sum_rows(x: jax.Array) -> jax.Array:
    """Sums all axes but the last in float32.

    Call `merge_leading_axes` first: on a CPU, sums over several leading axes become slow windowed reductions.
    """
    return jnp.sum(x.astype(jnp.float32), axis=tuple(range(x.ndim - 1)))


def weight_gradient(a_NK: jax.Array, b_NF: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns `a^T b` `[K, F]`.

    On a CPU, `a` is transposed in memory first: XLA:CPU contracts leading axes of bfloat16 five times slower.
    """
    if a_NK.ndim == 3:
        return dot("btk,btf->kf", a_NK, b_NF, out_dtype)
    if target_platform() == "cpu":
        return dot("kn,nf->kf", transpose_last_axes(a_NK), b_NF, out_dtype)
    return dot("nk,nf->kf", a_NK, b_NF, out_dtype)


def dot(spec: str, a: jax.Array, b: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """`einsum` of two operands of one dtype, summed in float32.

    XLA:CPU is fast only if the result is float32, so it is cast afterwards; on other platforms the library casts it.
    """
    result_dtype = jnp.float32 if target_platform() == "cpu" else out_dtype
    return jnp.einsum(spec, a, b, preferred_element_type=result_dtype).astype(out_dtype)


def row_major(x: jax.Array) -> jax.Array:
    """Constrains `x` to be row-major in memory, so that XLA copies it once instead of running a slow transposed matmul.

    No-op where the compiler shards arrays: XLA would gather the whole array on each device.
    """
    if sharded_by_compiler():
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def transpose_last_axes(x: jax.Array) -> jax.Array:
    """Swaps the last two axes in memory."""
    return row_major(jnp.swapaxes(x, -1, -2))


def as_matrix(w: jax.Array) -> jax.Array:
    """Merges all axes but the first."""
    return w.reshape(w.shape[0], -1)
