"""The parts of a transformer block.

Shape suffixes: B batch, T position, D n_embd, F MLP width, H query heads, G key and value heads, C head_dim,
E = H / G + 2: the queries, the key and the value of one key head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.run import ModelConfig
from gptjax.model import cache as kv
from gptjax.model.adapters import BlockAdapter, LowRank, Prefix, prefixed_attention, with_prefix
from gptjax.model.cache import LayerCache
from gptjax.ops.attention import cached_attention, self_attention, split_heads
from gptjax.ops.elementwise import dropout, gelu, layer_norm, layer_norm_beside
from gptjax.ops.linear import linear, mlp
from gptjax.ops.matmul import add_bias
from gptjax.ops.projection import Projection, project

INIT_STD = 0.02  # GPT-2's
normal = jax.nn.initializers.normal


class LayerNorm(nnx.Module):
    """Layer norm with a learned scale and, where the config has biases, a bias."""

    def __init__(self, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(config.n_embd))
        self.bias = nnx.Param(jnp.zeros(config.n_embd)) if config.bias else None

    def __call__(self, x_BTD: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        return layer_norm(x_BTD, self.scale[...], _value(self.bias), dtype)

    def beside(self, x_BTD: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Returns the residual stream too, see `layer_norm_beside`."""
        return layer_norm_beside(x_BTD, self.scale[...], _value(self.bias), dtype)


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

    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None,
        key: jax.Array | None,
        adapter: BlockAdapter | None = None,
        prefix: Prefix | None = None,
        onto: jax.Array | None = None,
    ) -> jax.Array:
        """Returns what the layer adds to the residual stream, float32, or the sum of it and `onto`."""
        keys = (None, None) if adapter is None or key is None else jax.random.split(jax.random.fold_in(key, 1))
        qkv_BTGEC = self.qkv(x_BTD, adapter and adapter.attn_w_qkv, keys[0])
        if prefix is None:
            y_BTHC = self_attention(qkv_BTGEC, segments_BT, self.window, self.dropout, key)
        else:
            y_BTHC = prefixed_attention(*split_heads(qkv_BTGEC), segments_BT, self.window, prefix)
        return self._out(y_BTHC, adapter and adapter.attn_w_out, keys[1], onto)

    def extend(
        self, x_BTD: jax.Array, cache: LayerCache, used: jax.Array, visible_BTS: jax.Array, prefix: Prefix | None
    ) -> tuple[jax.Array, LayerCache]:
        """The same for tokens that follow `used` others in `cache`; returns the longer cache too."""
        q_BTHC, k_BTGC, v_BTGC = split_heads(self.qkv(x_BTD))
        cache = kv.write(cache, used, k_BTGC, v_BTGC)
        seen = (*cache, visible_BTS) if prefix is None else with_prefix(prefix, *cache, visible_BTS)
        return self._out(cached_attention(q_BTHC, *seen)), cache

    def qkv(self, x_BTD: jax.Array, low_rank: LowRank | None = None, key: jax.Array | None = None) -> jax.Array:
        """Queries, keys and values, `[B, T, G, E, C]`."""
        qkv_BTGEC = _linear(x_BTD, self.w_qkv, self.b_qkv, x_BTD.dtype).reshape(*x_BTD.shape[:-1], *self.shape_GEC)
        return qkv_BTGEC if low_rank is None else qkv_BTGEC + low_rank(x_BTD, key, x_BTD.dtype)

    def _out(
        self,
        y_BTHC: jax.Array,
        low_rank: LowRank | None = None,
        key: jax.Array | None = None,
        onto: jax.Array | None = None,
    ) -> jax.Array:
        B, T, H, C = y_BTHC.shape
        y_BTK = y_BTHC.reshape(B, T, H * C)
        y_BTD = _linear(y_BTK, self.w_out, self.b_out, jnp.float32, onto=onto)
        return y_BTD if low_rank is None else y_BTD + low_rank(y_BTK, key, jnp.float32)


class MLP(nnx.Module):
    """Two linear layers with a GELU between them; both weights are `[D, F]`, see `matmul`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.n_embd, 4 * config.n_embd
        self.w_in = nnx.Param(normal(INIT_STD)(rngs.params(), (D, F)))
        self.w_out = nnx.Param(normal(_residual_std(config))(rngs.params(), (D, F)))
        self.b_in = nnx.Param(jnp.zeros(F)) if config.bias else None
        self.b_out = nnx.Param(jnp.zeros(D)) if config.bias else None

    def __call__(
        self,
        x_BTD: jax.Array,
        adapter: BlockAdapter | None = None,
        key: jax.Array | None = None,
        onto: jax.Array | None = None,
    ) -> jax.Array:
        """Returns what the layer adds to the residual stream, float32, or the sum of it and `onto`."""
        if not isinstance(self.w_in.get_value(), Projection) and (adapter is None or not adapter.in_mlp):
            return mlp(x_BTD, self.w_in[...], _value(self.b_in), self.w_out[...], _value(self.b_out), onto)
        keys = (None, None) if key is None else jax.random.split(key)
        h_BTF = _linear(x_BTD, self.w_in, self.b_in, x_BTD.dtype)
        if adapter is not None and adapter.mlp_w_in is not None:
            h_BTF = h_BTF + adapter.mlp_w_in(x_BTD, keys[0], x_BTD.dtype)
        h_BTF = gelu(h_BTF)
        y_BTD = _linear(h_BTF, self.w_out, self.b_out, jnp.float32, outputs_first=True, onto=onto)
        if adapter is not None and adapter.mlp_w_out is not None:
            y_BTD = y_BTD + adapter.mlp_w_out(h_BTF, keys[1], jnp.float32)
        return y_BTD


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
        adapter: BlockAdapter | None = None,
        prefix: Prefix | None = None,
    ) -> jax.Array:
        """Applies the block to the float32 residual stream; `key` is of this block, None: no dropout.

        `adapter` is what was added to this block. What `prefix` holds stands before every row; attention weights are
        then not dropped.
        """
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        adapter_keys = (
            (None,) * 3 if adapter is None or key is None else jax.random.split(jax.random.fold_in(key, 3), 3)
        )
        # What a layer gives is added to the stream at once, unless something comes between.
        between = (self.dropout and key is not None) or (adapter is not None and adapter.attn is not None)
        x_BTD, h_BTD = self.norm_1.beside(x_BTD, dtype)
        y_BTD = self.attn(h_BTD, segments_BT, keys[0], adapter, prefix, None if between else x_BTD)
        if adapter is not None and adapter.attn is not None:
            y_BTD = adapter.attn(y_BTD, dtype, adapter_keys[0])
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, keys[1]) if between else y_BTD
        x_BTD, h_BTD = self.norm_2.beside(x_BTD, dtype)
        y_BTD = self.mlp(h_BTD, adapter, adapter_keys[1], None if between else x_BTD)
        if adapter is not None and adapter.mlp is not None:
            y_BTD = adapter.mlp(y_BTD, dtype, adapter_keys[2])
        return x_BTD + dropout(y_BTD, self.dropout, keys[2]) if between else y_BTD

    def extend(
        self,
        x_BTD: jax.Array,
        dtype: jax.typing.DTypeLike,
        cache: LayerCache,
        used: jax.Array,
        visible_BTS: jax.Array,
        adapter: BlockAdapter | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Applies the block to tokens that follow those in `cache`; returns the longer cache too."""
        prefix = None if adapter is None else adapter.prefix(dtype)
        y_BTD, cache = self.attn.extend(self.norm_1(x_BTD, dtype), cache, used, visible_BTS, prefix)
        if adapter is not None and adapter.attn is not None:
            y_BTD = adapter.attn(y_BTD, dtype, None)
        x_BTD = x_BTD + y_BTD
        y_BTD = self.mlp(self.norm_2(x_BTD, dtype))
        if adapter is not None and adapter.mlp is not None:
            y_BTD = adapter.mlp(y_BTD, dtype, None)
        return x_BTD + y_BTD, cache

    def prefix_of(self, prompt_1PD: jax.Array, dtype: jax.typing.DTypeLike) -> Prefix:
        """What a prompt shows to what follows it."""
        _, k_1PGC, v_1PGC = split_heads(self.attn.qkv(self.norm_1(prompt_1PD, dtype)))
        return Prefix(k_1PGC[0], v_1PGC[0])


def _residual_std(config: ModelConfig) -> float:
    """GPT-2: what is added to the residual stream shrinks with depth, two additions a block."""
    return INIT_STD / (2 * config.n_layer) ** 0.5


def _linear(
    x: jax.Array,
    weight: nnx.Param,
    bias: nnx.Param | None,
    out_dtype: jax.typing.DTypeLike,
    outputs_first: bool = False,
    onto: jax.Array | None = None,
) -> jax.Array:
    """Multiplies by a weight as it is trained, or as it is laid out for decoding; adds `bias` and `onto`."""
    w = weight.get_value()
    if not isinstance(w, Projection):
        return linear(x, w, _value(bias), out_dtype, outputs_first, onto)
    y = project(x, w).astype(out_dtype)
    if bias is not None:
        y = add_bias(y.reshape(*y.shape[:-1], *bias.shape), bias[...])
    return y if onto is None else onto + y


def _value(param: nnx.Param | None) -> jax.Array | None:
    return None if param is None else param[...]
