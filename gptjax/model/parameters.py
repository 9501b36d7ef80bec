"""Shared by all layers: initializers, and a linear layer whose weight may have a layout for decoding."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.model import ModelConfig
from gptjax.ops import linear as ops
from gptjax.ops.matmul import add_bias
from gptjax.ops.projection import Projection, project

INIT_STD = 0.02  # GPT-2's
normal = jax.nn.initializers.normal
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def weight_init(config: ModelConfig) -> Initializer:
    """Initializer of matrices that read the residual stream."""
    if config.init == "gpt2":
        return normal(INIT_STD * config.width_ratio**0.5)
    bound = (3 / config.n_embd) ** 0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def output_init(config: ModelConfig) -> Initializer:
    """Initializer of matrices whose output is added to the residual stream. GPT-2 scales it by the square root of the
    number of these additions, two per block.
    """
    if config.init != "gpt2":
        return jax.nn.initializers.zeros
    return normal(INIT_STD * config.width_ratio**0.5 / (2 * config.n_layer) ** 0.5)


def zeros(*shape: int) -> nnx.Param:
    """A parameter initialized with zeros."""
    return nnx.Param(jnp.zeros(shape))


def value(param: nnx.Param | None) -> jax.Array | None:
    """A parameter's array, or None."""
    return None if param is None else param[...]


def has_decoding_layout(weight: nnx.Param) -> bool:
    """Whether a weight has a layout for decoding, see `ops.projection`."""
    return isinstance(weight.get_value(), Projection)


def linear(
    x: jax.Array,
    weight: nnx.Param,
    bias: nnx.Param | None,
    out_dtype: jax.typing.DTypeLike,
    outputs_first: bool = False,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Multiplies by a weight in its layout for training or for decoding; adds `bias` and `residual` if given."""
    w = weight.get_value()
    if not isinstance(w, Projection):
        return ops.linear(x, w, value(bias), out_dtype, outputs_first, residual)
    y = project(x, w).astype(out_dtype)
    if bias is not None:
        y = add_bias(y.reshape(*y.shape[:-1], *bias.shape), bias[...])
    return y if residual is None else residual + y
