"""The parts of a transformer block.

Shape suffixes: B batch, T position, D n_embd, F MLP width, H query heads, G key and value heads, C head_dim,
E = H / G + 2: the queries, the key and the value of one key head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import ModelConfig
from gptjax.model import cache as kv
from gptjax.model.cache import LayerCache
from gptjax.ops.attention import attention, cached_attention
from gptjax.ops.elementwise import dropout, gelu, layer_norm
from gptjax.ops.matmul import add_bias, matmul
from gptjax.ops.projection import Projection, project

INIT_STD = 0.02  # GPT-2's
normal = jax.nn.initializers.normal


class LayerNorm(nnx.Module):
    """Layer norm with a learned scale and, where the config has biases, a bias."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(config.n_embd))
        self.bias = nnx.Param(jnp.zeros(config.n_embd)) if config.bias else None

    def __call__(self, x_BTD: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return layer_norm(x_BTD, self.scale[...], None if self.bias is None else self.bias[...], dtype)


class Attention(nnx.Module):
    """Causal multi-head self-attention; heads of one key head lie together, so that they shard together."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, G, C = config.n_embd, config.kv_heads, config.head_dim
        E = config.n_head // G + 2
        self.shape_GEC = (G, E, C)
        self.w_qkv = nnx.Param(normal(INIT_STD)(rngs.params(), (D, G, E, C)))
        self.w_out = nnx.Param(normal(_residual_std(config))(rngs.params(), (config.n_head * C, D)))
        self.b_qkv = nnx.Param(jnp.zeros((G, E, C))) if config.bias else None
        self.b_out = nnx.Param(jnp.zeros(D)) if config.bias else None
        self.dropout = config.dropout
        self.window = config.attention_window

    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """Returns what the layer adds to the residual stream, float32."""
        y_BTHC = attention(*self._qkv(x_BTD), segments_BT, self.window, self.dropout, key)
        return self._out(y_BTHC)

    def extend(
        self, x_BTD: jax.Array, cache: LayerCache, used: jax.Array, visible_BTS: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        """The same for tokens that follow `used` others in `cache`; returns the longer cache too."""
        q_BTHC, k_BTGC, v_BTGC = self._qkv(x_BTD)
        cache = kv.write(cache, used, k_BTGC, v_BTGC)
        return self._out(cached_attention(q_BTHC, *cache, visible_BTS)), cache

    def _qkv(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        B, T, _ = x_BTD.shape
        qkv_BTGEC = _linear(x_BTD, self.w_qkv, x_BTD.dtype).reshape(B, T, *self.shape_GEC)
        qkv_BTGEC = _add_bias(qkv_BTGEC, self.b_qkv)
        q_BTHC = qkv_BTGEC[:, :, :, :-2].reshape(B, T, -1, self.shape_GEC[-1])
        return q_BTHC, qkv_BTGEC[:, :, :, -2], qkv_BTGEC[:, :, :, -1]

    def _out(self, y_BTHC: jax.Array) -> jax.Array:
        B, T, H, C = y_BTHC.shape
        return _add_bias(_linear(y_BTHC.reshape(B, T, H * C), self.w_out, jnp.float32), self.b_out)


class MLP(nnx.Module):
    """Two linear layers with a GELU between them; both weights are `[D, F]`, see `matmul`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.n_embd, 4 * config.n_embd
        self.w_in = nnx.Param(normal(INIT_STD)(rngs.params(), (D, F)))
        self.w_out = nnx.Param(normal(_residual_std(config))(rngs.params(), (D, F)))
        self.b_in = nnx.Param(jnp.zeros(F)) if config.bias else None
        self.b_out = nnx.Param(jnp.zeros(D)) if config.bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns what the layer adds to the residual stream, float32."""
        h_BTF = gelu(_add_bias(_linear(x_BTD, self.w_in, x_BTD.dtype), self.b_in))
        return _add_bias(_linear(h_BTF, self.w_out, jnp.float32, outputs_first=True), self.b_out)


class Block(nnx.Module):
    """Pre-norm residual block (GPT-2, section 2.3)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm_1 = LayerNorm(config)
        self.attn = Attention(config, rngs=rngs)
        self.norm_2 = LayerNorm(config)
        self.mlp = MLP(config, rngs=rngs)
        self.dropout = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        dtype: jax.typing.DTypeLike,
        segments_BT: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        """Applies the block to the float32 residual stream; `key` is of this block, None: no dropout."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        y_BTD = self.attn(self.norm_1(x_BTD, dtype), segments_BT, keys[0])
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, keys[1])
        y_BTD = self.mlp(self.norm_2(x_BTD, dtype))
        return x_BTD + dropout(y_BTD, self.dropout, keys[2])

    def extend(
        self,
        x_BTD: jax.Array,
        dtype: jax.typing.DTypeLike,
        cache: LayerCache,
        used: jax.Array,
        visible_BTS: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """Applies the block to tokens that follow those in `cache`; returns the longer cache too."""
        y_BTD, cache = self.attn.extend(self.norm_1(x_BTD, dtype), cache, used, visible_BTS)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.norm_2(x_BTD, dtype)), cache


def _residual_std(config: ModelConfig) -> float:
    """GPT-2: what is added to the residual stream shrinks with depth, two additions a block."""
    return INIT_STD / (2 * config.n_layer) ** 0.5


def _linear(x: jax.Array, weight: nnx.Param, out_dtype: jax.typing.DTypeLike, outputs_first: bool = False) -> jax.Array:
    """Multiplies by a weight as it is trained, or as it is laid out for decoding."""
    w = weight.get_value()
    if isinstance(w, Projection):
        return project(x, w).astype(out_dtype)
    return matmul(x, w, out_dtype, outputs_first)


def _add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return add_bias(x, None if bias is None else bias[...])
