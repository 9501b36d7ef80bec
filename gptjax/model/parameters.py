"""What all layers share: how parameters are drawn, and a linear layer whose weight may be laid out for decoding."""

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
    """How matrices that read the residual stream are drawn."""
    if config.init == "gpt2":
        return normal(INIT_STD)
    bound = (3 / config.n_embd) ** 0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def output_init(config: ModelConfig) -> Initializer:
    """How matrices that add to the residual stream are drawn: in GPT-2 smaller with depth, two additions a block."""
    return normal(INIT_STD / (2 * config.n_layer) ** 0.5) if config.init == "gpt2" else jax.nn.initializers.zeros


def zeros(*shape: int) -> nnx.Param:
    """A parameter that starts at zero."""
    return nnx.Param(jnp.zeros(shape))


def value(param: nnx.Param | None) -> jax.Array | None:
    """A parameter's array, None where there is none."""
    return None if param is None else param[...]


def laid_out(weight: nnx.Param) -> bool:
    """Whether a weight is laid out for decoding, see `ops.projection`."""
    return isinstance(weight.get_value(), Projection)


def linear(
    x: jax.Array,
    weight: nnx.Param,
    bias: nnx.Param | None,
    out_dtype: jax.typing.DTypeLike,
    outputs_first: bool = False,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Multiplies by a weight as it is trained, or as it is laid out for decoding; adds `bias` and `residual`."""
    w = weight.get_value()
    if not isinstance(w, Projection):
        return ops.linear(x, w, value(bias), out_dtype, outputs_first, residual)
    y = project(x, w).astype(out_dtype)
    if bias is not None:
        y = add_bias(y.reshape(*y.shape[:-1], *bias.shape), bias[...])
    return y if residual is None else residual + y
