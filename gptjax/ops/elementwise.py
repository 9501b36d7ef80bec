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
from gptjax.ops.axes import flat
from gptjax.ops.matmul import sum_rows
from gptjax.ops.scheduling import optimization_barrier, recompute_in_backward

NORM_EPSILON = 1e-5  # GPT-2's
GELU_RANGE = 5.0
"""Beyond it GELU is within 3e-7 of the larger of `x` and 0."""
# Least maximal errors on that range, by weighted least squares, of GELU(x) / x - 1/2 (4e-8) and GELU'(x) - 1/2 (2e-7).
GELU_SHARE = (
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
    """What `layer_norm` computes, differentiated by JAX."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    y = normed * _like(x, scale_D)
    return (y if bias_D is None else y + _like(x, bias_D)).astype(out_dtype)


def layer_norm(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, out_dtype, epsilon: float = NORM_EPSILON
) -> jax.Array:
    """Normalises the last axis of `x` in float32 (arXiv:1607.06450) and casts the result to `out_dtype`.

    Each result is one operation that computes what it needs from `x`: XLA:CPU gives a norm to its library whole where
    nothing inside is read elsewhere, and is several times slower where parts of it go through memory.
    """
    return _layer_norm(flat(x), scale_D, bias_D, out_dtype, epsilon).reshape(x.shape)


def layer_norm_with_residual(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, out_dtype, epsilon: float = NORM_EPSILON
) -> tuple[jax.Array, jax.Array]:
    """Returns the float32 `x` and its `layer_norm`, so that the gradients of both arrive together: a kernel adds them
    in one pass.
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
    # Mean and deviation are stored: recomputing them cannot be fused with the sums over rows that the gradient of the
    # scale needs, so XLA would write all of what it sums to memory.
    statistics = jax.lax.optimization_barrier(_statistics(x, epsilon))
    normed, _ = _normed(x, statistics, epsilon)
    return _scaled(normed, scale_D, bias_D, out_dtype), (x, scale_D, bias_D, statistics)


def _scaled(normed, scale_D, bias_D, out_dtype):
    y = normed * _like(normed, scale_D)
    return (y if bias_D is None else y + _like(normed, bias_D)).astype(out_dtype)


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
    dnormed = dy.astype(jnp.float32) * _like(x, scale_D)
    along = normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True)
    return (inverse * (dnormed - jnp.mean(dnormed, axis=-1, keepdims=True) - along)).astype(x.dtype)


def _layer_norm_dscale(statistics, epsilon, x, dy):
    return sum_rows(dy.astype(jnp.float32) * _normed(x, statistics, epsilon)[0])


_layer_norm = jax.custom_vjp(_layer_norm_result, nondiff_argnums=(3, 4))
_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def rms_norm_reference(x: jax.Array, scale_D: jax.Array | None, out_dtype, epsilon: float) -> jax.Array:
    """What `rms_norm` computes, differentiated by JAX."""
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return (y if scale_D is None else y * _like(x, scale_D)).astype(out_dtype)


def rms_norm(x: jax.Array, scale_D: jax.Array | None, out_dtype, epsilon: float) -> jax.Array:
    """Divides the last axis of `x` by its root mean square, in float32 (arXiv:1910.07467), and casts the result.

    The backward pass reads `x` alone: it recomputes the rest.
    """
    y: Any = _rms_norm(flat(x), scale_D, out_dtype, epsilon)
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
    dnormed = dy if scale_D is None else dy * _like(x32, scale_D)
    normed = x32 * inverse
    return (inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=-1, keepdims=True))).astype(x.dtype)


def _inverse_rms(x, epsilon):
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def gelu_reference(x: jax.Array) -> jax.Array:
    """What `gelu` computes, differentiated by JAX."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form (arXiv:1606.08415), computed in float32: in bfloat16 it costs twice as much on a CPU.

    No tanh is called: what the cubic, the tanh and its derivative come to are rational functions of `x`, as exact as
    float32 can be, at half of the time on a CPU.
    """
    x32 = optimization_barrier(x)[0].astype(
        jnp.float32
    )  # read as it is stored: not the float32 of which it was rounded
    above = jnp.maximum(x32, -GELU_RANGE)
    return (above * (0.5 + _odd(GELU_SHARE, jnp.minimum(above, GELU_RANGE)))).astype(x.dtype)


def _gelu_backward(x, dy):
    inside = jnp.clip(x.astype(jnp.float32), -GELU_RANGE, GELU_RANGE)
    return (((0.5 + _odd(GELU_SLOPE, inside)) * dy.astype(jnp.float32)).astype(x.dtype),)


def _odd(parts, x):
    """`x` times the quotient of two polynomials in its square, whose coefficients begin with the highest power's."""
    square = x * x
    above, below = (functools.reduce(lambda total, c: total * square + c, part) for part in parts)
    return x * above / below


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def dropout_keep(key: jax.Array, shape: tuple[int, ...], rate: float) -> tuple[jax.Array, float]:
    """Draws which elements stay, and the scale that keeps their expectation.

    16 random bits per element halve the cost of the generator; the scale is exact for the rounded rate.
    """
    threshold = round(rate * 2**16)
    return jax.random.bits(key, shape, "uint16") >= threshold, 2**16 / (2**16 - threshold)


def dropout_keep_at(
    key_data: jax.Array, rows_N1: jax.Array, columns: jax.Array, rate: float
) -> tuple[jax.Array, float]:
    """The same for elements that are named by two numbers, so that it does not matter which device draws them.

    Args:
        key_data: `jax.random.key_data` of a threefry key, as arrays pass through `shard_map`.
        rows_N1: uint32, `[..., N, 1]`.
        columns: uint32, `[S]`.
        rate: Probability of dropping an element.

    Returns:
        What stays, `[..., N, S]`, and the scale.
    """
    shape = (*rows_N1.shape[:-1], columns.shape[0])
    counts = [jnp.broadcast_to(x, shape) for x in (rows_N1, columns.reshape((1,) * (len(shape) - 1) + (-1,)))]
    high, low = threefry2x32_p.bind(key_data[0], key_data[1], *counts)
    threshold = round(rate * 2**16)
    return (high ^ low).astype(jnp.uint16) >= threshold, 2**16 / (2**16 - threshold)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the others up; no key: leaves `x` as it is."""
    if key is None or not rate:
        return x
    keep, scale = dropout_keep(key, x.shape, rate)
    return jnp.where(keep, x * jnp.asarray(scale, x.dtype), jnp.zeros((), x.dtype))


def _like(x: jax.Array, vector_D: jax.Array) -> jax.Array:
    """Gives a vector leading axes to broadcast along `x`, since rank promotion is an error here."""
    return vector_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
