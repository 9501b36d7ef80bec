"""Norms, by name.

Shape suffixes: D width of the normalised axis.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.model import ModelConfig
from gptjax.ops.elementwise import layer_norm, layer_norm_with_residual, rms_norm


class LayerNorm(nnx.Module):
    """Layer norm (arXiv:1607.06450) with a learned scale, and a bias if the config has biases."""

    def __init__(self, config: ModelConfig, width: int = 0):
        D = width or config.n_embd
        self.scale = nnx.Param(jnp.ones(D)) if config.norm_scale else None
        self.bias = nnx.Param(jnp.zeros(D)) if config.bias and config.norm_scale else None
        self.width, self.epsilon = D, config.norm_epsilon

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return layer_norm(x, *self._parameters(), dtype, self.epsilon)

    def with_residual(self, x_BTD: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Also returns the residual stream, see `layer_norm_with_residual`."""
        return layer_norm_with_residual(x_BTD, *self._parameters(), dtype, self.epsilon)

    def _parameters(self) -> tuple[jax.Array, jax.Array | None]:
        scale_D = jnp.ones(self.width) if self.scale is None else self.scale[...]
        return scale_D, None if self.bias is None else self.bias[...]


class RMSNorm(nnx.Module):
    """Root mean square norm (arXiv:1910.07467); without `model.norm_scale` it has no parameters."""

    def __init__(self, config: ModelConfig, width: int = 0):
        self.scale = nnx.Param(jnp.ones(width or config.n_embd)) if config.norm_scale else None
        self.epsilon = config.norm_epsilon

    def __call__(self, x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return rms_norm(x, None if self.scale is None else self.scale[...], dtype, self.epsilon)

    def with_residual(self, x_BTD: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Also returns the residual stream."""
        return x_BTD, self(x_BTD, dtype)


Norm = LayerNorm | RMSNorm
NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}
"""The class for each value of `model.norm`."""
