"""Norms, GELU and dropout, with backward rules that XLA compiles well.

Shape suffixes: B batch, T position, D n_embd.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

from gptjax.machine.platform import target_platform
from gptjax.ops import kernels
from gptjax.ops.axes import merge_leading_axes
from gptjax.ops.matmul import sum_rows
from gptjax.ops.scheduling import optimization_barrier, recompute_in_backward

NORM_EPSILON = 1e-5  # GPT-2's
GELU_RANGE = 5.0
"""For larger magnitudes GELU is within 3e-7 of `max(x, 0)`."""
# Rational approximations on that range, with nearly minimal largest errors: of GELU(x) / x - 1/2 (error 4e-8) and of
# GELU'(x) - 1/2 (error 2e-7).
GELU_RATIO = (
    (4.5113577e-06, 1.6492184e-04, 3.6890475e-03, 3.6817440e-02, 3.9894204e-01),
    (4.3797733e-07, 7.2806296e-05, 1.4358614e-03, 2.7192105e-02, 2.5977553e-01, 1.0),
)
GELU_SLOPE = (
    (1.2399753e-07, 3.0032753e-05, -1.5273421e-04, 1.3032327e-02, -3.9423244e-02, 7.9788568e-01),
    (6.8823448e-06, 1.3653390e-04, 2.2024960e-03, 3.5258977e-02, 2.8558478e-01, 1.0),
)


def layer_norm_reference(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, out_dtype, epsilon: float = NORM_EPSILON
) -> jax.Array:
    """Computes `layer_norm`, differentiated by JAX."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    y = normed * _broadcast_along(x, scale_D)
    return (y if bias_D is None else y + _broadcast_along(x, bias_D)).astype(out_dtype)


def layer_norm(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, out_dtype, epsilon: float = NORM_EPSILON
) -> jax.Array:
    """Normalises the last axis of `x` in float32 (arXiv:1607.06450) and casts the result to `out_dtype`.

    The output and each gradient recompute the statistics from `x`. XLA:CPU passes a norm to its library only if no
    intermediate result is used elsewhere; without the library it is several times slower.
    """
    return _layer_norm(merge_leading_axes(x), scale_D, bias_D, out_dtype, epsilon).reshape(x.shape)


def layer_norm_with_residual(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, out_dtype, epsilon: float = NORM_EPSILON
) -> tuple[jax.Array, jax.Array]:
    """Returns the float32 `x` and its `layer_norm`. The backward pass gets both gradients at once, so that a kernel
    can add them in one pass.
    """
    if x.dtype != jnp.float32 or not kernels.usable(out_dtype, x.shape[-1]):
        return x, layer_norm(x, scale_D, bias_D, out_dtype, epsilon)
    pair: Any = _with_residual(x.reshape(-1, x.shape[-1]), scale_D, bias_D, jnp.dtype(out_dtype), epsilon)
    return pair[0].reshape(x.shape), pair[1].reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _with_residual(x_ND, scale_D, bias_D, out_dtype, epsilon):
    return x_ND, kernels.layer_norm(x_ND, scale_D, bias_D, epsilon, out_dtype)


def _with_residual_forward(x_ND, scale_D, bias_D, out_dtype, epsilon):
    return _with_residual(x_ND, scale_D, bias_D, out_dtype, epsilon), (x_ND, scale_D, bias_D)


def _with_residual_backward(_, epsilon, saved, gradients):
    x_ND, scale_D, bias_D = saved
    stream_ND, dy_ND = gradients
    dx_ND, dscale_D, dbias_D = kernels.layer_norm_gradient(x_ND, scale_D, dy_ND, stream_ND, epsilon)
    return dx_ND, dscale_D.astype(scale_D.dtype), None if bias_D is None else dbias_D.astype(bias_D.dtype)


_with_residual.defvjp(_with_residual_forward, _with_residual_backward)


def _layer_norm_result(x, scale_D, bias_D, out_dtype, epsilon) -> jax.Array:
    return _scaled(_normed(x, None, epsilon)[0], scale_D, bias_D, out_dtype)


def _layer_norm_forward(x, scale_D, bias_D, out_dtype, epsilon):
    if target_platform() != "gpu":
        return _layer_norm_result(x, scale_D, bias_D, out_dtype, epsilon), (x, scale_D, bias_D, None)
    # Mean and deviation are stored. XLA:GPU cannot fuse their recomputation with the row sums in the gradient of the
    # scale, and would write the summands to memory.
    statistics = jax.lax.optimization_barrier(_statistics(x, epsilon))
    normed, _ = _normed(x, statistics, epsilon)
    return _scaled(normed, scale_D, bias_D, out_dtype), (x, scale_D, bias_D, statistics)


def _scaled(normed, scale_D, bias_D, out_dtype):
    y = normed * _broadcast_along(normed, scale_D)
    return (y if bias_D is None else y + _broadcast_along(normed, bias_D)).astype(out_dtype)


def _statistics(x, epsilon):
    """Mean and inverse deviation, `[..., 1]` float32 each."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True) + epsilon)


def _normed(x, statistics, epsilon):
    mean, inverse = _statistics(x, epsilon) if statistics is None else statistics
    return (x.astype(jnp.float32) - mean) * inverse, inverse


def _layer_norm_backward(out_dtype, epsilon, saved, dy):
    x, scale_D, bias_D, statistics = saved
    x = recompute_in_backward(x, dy)
    dx = _layer_norm_dx(statistics, epsilon, *optimization_barrier(x, scale_D, dy))
    dscale = _layer_norm_dscale(statistics, epsilon, *optimization_barrier(x, dy)).astype(scale_D.dtype)
    return dx, dscale, None if bias_D is None else sum_rows(*optimization_barrier(dy)).astype(bias_D.dtype)


def _layer_norm_dx(statistics, epsilon, x, scale_D, dy):
    normed, inverse = _normed(x, statistics, epsilon)
    dnormed = dy.astype(jnp.float32) * _broadcast_along(x, scale_D)
    along = normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True)
    return (inverse * (dnormed - jnp.mean(dnormed, axis=-1, keepdims=True) - along)).astype(x.dtype)


def _layer_norm_dscale(statistics, epsilon, x, dy):
    return sum_rows(dy.astype(jnp.float32) * _normed(x, statistics, epsilon)[0])


_layer_norm = jax.custom_vjp(_layer_norm_result, nondiff_argnums=(3, 4))
_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def rms_norm_reference(x: jax.Array, scale_D: jax.Array | None, out_dtype, epsilon: float) -> jax.Array:
    """Computes `rms_norm`, differentiated by JAX."""
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return (y if scale_D is None else y * _broadcast_along(x, scale_D)).astype(out_dtype)


def rms_norm(x: jax.Array, scale_D: jax.Array | None, out_dtype, epsilon: float) -> jax.Array:
    """Divides the last axis of `x` by its root mean square, in float32 (arXiv:1910.07467), and casts the result.

    The backward pass recomputes everything from `x`.
    """
    y: Any = _rms_norm(merge_leading_axes(x), scale_D, out_dtype, epsilon)
    return y.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rms_norm(x, scale_D, out_dtype, epsilon):
    return rms_norm_reference(x, scale_D, out_dtype, epsilon)


def _rms_norm_forward(x, scale_D, out_dtype, epsilon):
    return _rms_norm(x, scale_D, out_dtype, epsilon), (x, scale_D)


def _rms_norm_backward(_, epsilon, saved, dy):
    x, scale_D = saved
    x = recompute_in_backward(x, dy)
    x_1, dy_1 = optimization_barrier(x, dy)
    dx = _rms_norm_dx(epsilon, x_1, dy_1, scale_D)
    if scale_D is None:
        return dx, None
    x_2, dy_2 = (part.astype(jnp.float32) for part in optimization_barrier(x, dy))
    return dx, sum_rows(dy_2 * x_2 * _inverse_rms(x_2, epsilon)).astype(scale_D.dtype)


def _rms_norm_dx(epsilon, x, dy, scale_D):
    x32, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    inverse = _inverse_rms(x32, epsilon)
    dnormed = dy if scale_D is None else dy * _broadcast_along(x32, scale_D)
    normed = x32 * inverse
    return (inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))).astype(x.dtype)


def _inverse_rms(x, epsilon):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def gelu_reference(x: jax.Array) -> jax.Array:
    """Computes `gelu`, differentiated by JAX."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Tanh approximation of GELU (arXiv:1606.08415), computed in float32; bfloat16 takes twice the time on a CPU.

    Rational functions of `x` replace the tanh and its derivative. They are as exact as float32 allows and take half the
    time on a CPU.
    """
    # The barrier makes XLA read the rounded `x` from memory, not the float32 value before rounding.
    x32 = optimization_barrier(x)[0].astype(jnp.float32)
    above = jnp.maximum(x32, -GELU_RANGE)
    return (above * (0.5 + _odd_rational(GELU_RATIO, jnp.minimum(above, GELU_RANGE)))).astype(x.dtype)


def _gelu_backward(x, dy):
    inside = jnp.clip(x.astype(jnp.float32), -GELU_RANGE, GELU_RANGE)
    return (((0.5 + _odd_rational(GELU_SLOPE, inside)) * dy.astype(jnp.float32)).astype(x.dtype),)


def _odd_rational(parts, x):
    """Returns `x` times the quotient of two polynomials in `x²`; coefficients start at the highest power."""
    square = x * x
    above, below = (functools.reduce(lambda total, c: total * square + c, part) for part in parts)
    return x * above / below


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def dropout_keep(key: jax.Array, shape: tuple[int, ...], rate: float) -> tuple[jax.Array, float]:
    """Draws a mask of the elements to keep, and the scale that preserves the expectation.

    16 random bits per element halve the cost of the generator. The scale is exact for the rounded rate.
    """
    threshold = round(rate * 2**16)
    return jax.random.bits(key, shape, "uint16") >= threshold, 2**16 / (2**16 - threshold)


def dropout_keep_at(
    key_data: jax.Array, rows_N1: jax.Array, columns: jax.Array, rate: float
) -> tuple[jax.Array, float]:
    """Like `dropout_keep`, but the bits of an element depend only on its row and column number, not on the device.

    Args:
        key_data: `jax.random.key_data` of a threefry key; plain arrays can pass through `shard_map`.
        rows_N1: uint32, `[..., N, 1]`.
        columns: uint32, `[S]`.
        rate: Probability of dropping an element.

    Returns:
        The mask of elements to keep, `[..., N, S]`, and the scale.
    """
    shape = (*rows_N1.shape[:-1], columns.shape[0])
    counts = [jnp.broadcast_to(x, shape) for x in (rows_N1, columns.reshape((1,) * (len(shape) - 1) + (-1,)))]
    high, low = threefry2x32_p.bind(key_data[0], key_data[1], *counts)
    threshold = round(rate * 2**16)
    return (high ^ low).astype(jnp.uint16) >= threshold, 2**16 / (2**16 - threshold)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the others up; without a key it returns `x`."""
    if key is None or not rate:
        return x
    keep, scale = dropout_keep(key, x.shape, rate)
    return jnp.where(keep, x * jnp.asarray(scale, x.dtype), jnp.zeros((), x.dtype))


def _broadcast_along(x: jax.Array, vector_D: jax.Array) -> jax.Array:
    """Adds leading axes to a vector, in float32, because implicit rank promotion is an error in this package."""
    return vector_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
