"""Activation functions by name. Each is computed in float32 and keeps the dtype and shape of its input.

Sources: GELU arXiv:1606.08415, SiLU arXiv:1702.03118, squared ReLU arXiv:2109.08668.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.ops.elementwise import gelu

Activation = Callable[[jax.Array], jax.Array]


def _in_float32(function: Activation) -> Activation:
    return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_exact": _in_float32(lambda x: jax.nn.gelu(x, approximate=False)),
    "relu": jax.nn.relu,
    "relu2": _in_float32(lambda x: jnp.square(jax.nn.relu(x))),
    "silu": _in_float32(jax.nn.silu),
    "tanh": _in_float32(jnp.tanh),
    "sigmoid": _in_float32(jax.nn.sigmoid),
}
"""Keys are the values of `model.activation`."""
