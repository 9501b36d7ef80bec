"""Linear layers with bias, and the MLP (linear, GELU, linear): XLA's matmuls, or a C++ kernel that fuses all of it.

Shape suffixes: N rows, K contracted, F outputs, D width of the residual stream.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.ops import kernels
from gptjax.ops.elementwise import gelu, gelu_reference
from gptjax.ops.matmul import add_bias, as_matrix, matmul, matmul_reference, sum_rows

MATMUL_OUTPUT = "matmul_output"
"""Checkpoint name of the output of a linear layer, for rematerialisation policies (`model/gpt.REMAT_POLICIES`)."""


def linear_reference(x, w, bias, out_dtype, outputs_first=False, residual=None) -> jax.Array:
    """Computes `linear` with JAX's own operations; differentiated by JAX."""
    y = matmul_reference(x, w, out_dtype, outputs_first)
    if bias is not None:
        y = y + bias.astype(out_dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
    return y if residual is None else residual + y


def linear(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
    outputs_first: bool = False,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Multiplies `x [..., K]` by `w [K, ...]`, or by `w [F, K]` if `outputs_first`; see `matmul`.

    Adds `bias`, which has the shape of the outputs, and the float32 `residual`, which has the shape of the result.
    """
    if not _kernel_usable(x, w):
        y = add_bias(checkpoint_name(matmul(x, w, out_dtype, outputs_first), MATMUL_OUTPUT), bias)
        return y if residual is None else residual + y
    outputs = w.shape[:1] if outputs_first else w.shape[1:]
    bias_F, residual_NF = None if bias is None else bias.reshape(-1), None if residual is None else _flat(residual)
    y_NF = _linear(_flat(x), as_matrix(w), bias_F, residual_NF, out_dtype, outputs_first)
    return checkpoint_name(y_NF, MATMUL_OUTPUT).reshape(*x.shape[:-1], *outputs)


def mlp_reference(x, w_in_DF, b_in_F, w_out_DF, b_out_D, residual=None) -> jax.Array:
    """Computes `mlp` with JAX's own operations; differentiated by JAX."""
    h = gelu_reference(linear_reference(x, w_in_DF, b_in_F, x.dtype))
    return linear_reference(h, w_out_DF, b_out_D, jnp.float32, True, residual)


def mlp(
    x: jax.Array,
    w_in_DF: jax.Array,
    b_in_F: jax.Array | None,
    w_out_DF: jax.Array,
    b_out_D: jax.Array | None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Applies a linear layer, GELU and a linear layer, and adds `residual`; returns float32 `[..., D]`."""
    if not _kernel_usable(x, w_in_DF):
        h = gelu(linear(x, w_in_DF, b_in_F, x.dtype))
        return linear(h, w_out_DF, b_out_D, jnp.float32, True, residual)
    residual_ND = None if residual is None else _flat(residual)
    y_ND = _mlp(_flat(x), w_in_DF, b_in_F, w_out_DF, b_out_D, residual_ND)
    return checkpoint_name(y_ND, MATMUL_OUTPUT).reshape(x.shape)


def _kernel_usable(x, w):
    return kernels.usable(x.dtype, x.size // x.shape[-1], *as_matrix(w).shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _linear(x_NK, w, bias_F, residual_NF, out_dtype, outputs_first):
    return kernels.linear(x_NK, w, bias_F, out_dtype, outputs_first, residual_NF)


def _linear_forward(x_NK, w, bias_F, residual_NF, out_dtype, outputs_first):
    return _linear(x_NK, w, bias_F, residual_NF, out_dtype, outputs_first), (x_NK, w, bias_F, residual_NF is not None)


def _linear_backward(_, outputs_first, saved, dy_NF):
    x_NK, w, bias_F, added = saved
    return *_gradients(x_NK, dy_NF, w, bias_F, outputs_first), dy_NF if added else None


_linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def _mlp(x_ND, w_in_DF, b_in_F, w_out_DF, b_out_D, residual_ND):
    return kernels.mlp(x_ND, w_in_DF, b_in_F, w_out_DF, b_out_D, residual_ND)


def _mlp_forward(x_ND, w_in_DF, b_in_F, w_out_DF, b_out_D, residual_ND):
    y_ND = _mlp(x_ND, w_in_DF, b_in_F, w_out_DF, b_out_D, residual_ND)
    return y_ND, (x_ND, w_in_DF, b_in_F, w_out_DF, b_out_D, residual_ND is not None)


def _mlp_backward(saved, dy_ND):
    x_ND, w_in_DF, b_in_F, w_out_DF, b_out_D, added = saved
    dx_ND, dw_in_DF, db_in_F, dw_out_DF = kernels.mlp_gradient(
        x_ND, w_in_DF, b_in_F, w_out_DF, dy_ND.astype(x_ND.dtype)
    )
    db_in_F = None if b_in_F is None else db_in_F.astype(b_in_F.dtype)
    db_out_D = None if b_out_D is None else sum_rows(dy_ND).astype(b_out_D.dtype)
    dws = dw_in_DF.astype(w_in_DF.dtype), dw_out_DF.astype(w_out_DF.dtype)
    return dx_ND, dws[0], db_in_F, dws[1], db_out_D, dy_ND if added else None


_mlp.defvjp(_mlp_forward, _mlp_backward)


def _gradients(x_NK, dy_NF, w, bias_F, outputs_first):
    dx_NK = kernels.linear(dy_NF.astype(x_NK.dtype), w, None, x_NK.dtype, not outputs_first)
    return dx_NK, *_weight_gradients(x_NK, dy_NF, w, bias_F, outputs_first)


def _weight_gradients(x_NK, dy_NF, w, bias_F, outputs_first):
    dy_cast_NF = dy_NF.astype(x_NK.dtype)
    if outputs_first:  # the kernel returns the row sums of its second operand, which is not the gradient here
        dw, db_F = kernels.weight_gradient(dy_cast_NF, x_NK)[0], sum_rows(dy_NF)
    else:
        dw, db_F = kernels.weight_gradient(x_NK, dy_cast_NF)
    return dw.astype(w.dtype), None if bias_F is None else db_F.astype(bias_F.dtype)


def _flat(x):
    return x.reshape(-1, x.shape[-1])
