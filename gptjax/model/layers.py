"""The parts of a transformer block.

Shape suffixes: B batch, T position, D n_embd, F MLP width, H query heads, G key and value heads, C head_dim,
E = H / G + 2: the queries, the key and the value of one key head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import ModelConfig
from gptjax.model import cache as kv
from gptjax.model.cache import Cache
from gptjax.ops.attention import attention, cached_attention
from gptjax.ops.elementwise import dropout, gelu, layer_norm
from gptjax.ops.matmul import add_bias, matmul

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
        self.w_qkv = nnx.Param(normal(INIT_STD)(rngs.params(), (D, G, E, C)))
        self.w_out = nnx.Param(normal(_residual_std(config))(rngs.params(), (config.n_head * C, D)))
        self.b_qkv = nnx.Param(jnp.zeros((G, E, C))) if config.bias else None
        self.b_out = nnx.Param(jnp.zeros(D)) if config.bias else None
        self.dropout = config.dropout

    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None,
        key: jax.Array | None,
        cache: Cache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns what the layer adds to the residual stream, float32, and the cache with its keys and values."""
        B, T, _ = x_BTD.shape
        qkv_BTGEC = _add_bias(matmul(x_BTD, self.w_qkv[...], x_BTD.dtype), self.b_qkv)
        C = qkv_BTGEC.shape[-1]
        q_BTHC = qkv_BTGEC[:, :, :, :-2].reshape(B, T, -1, C)
        k_BTGC, v_BTGC = qkv_BTGEC[:, :, :, -2], qkv_BTGEC[:, :, :, -1]
        if cache is None:
            y_BTHC = attention(q_BTHC, k_BTGC, v_BTGC, segments_BT, self.dropout, key)
        else:
            cache = kv.write(cache, layer, k_BTGC, v_BTGC)
            y_BTHC = cached_attention(q_BTHC, *kv.read(cache, layer), kv.visible_slots(cache, T))
        return _add_bias(matmul(y_BTHC.reshape(B, T, -1), self.w_out[...], jnp.float32), self.b_out), cache


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
        h_BTF = gelu(_add_bias(matmul(x_BTD, self.w_in[...], x_BTD.dtype), self.b_in))
        return _add_bias(matmul(h_BTF, self.w_out[...], jnp.float32, True), self.b_out)


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
        cache: Cache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, Cache | None]:
        """Applies the block to the float32 residual stream."""
        keys = (None, None, None) if key is None else jax.random.split(jax.random.fold_in(key, layer), 3)
        y_BTD, cache = self.attn(self.norm_1(x_BTD, dtype), segments_BT, keys[0], cache, layer)
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, keys[1])
        y_BTD = self.mlp(self.norm_2(x_BTD, dtype))
        return x_BTD + dropout(y_BTD, self.dropout, keys[2]), cache


def _residual_std(config: ModelConfig) -> float:
    """GPT-2: what is added to the residual stream shrinks with depth, two additions a block."""
    return INIT_STD / (2 * config.n_layer) ** 0.5


def _add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return add_bias(x, None if bias is None else bias[...])
