"""A transformer block. The same code trains, prefills and decodes.

Shape suffixes: B batch, T position, D n_embd, F MLP width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.model import ModelConfig
from gptjax.model.adapters import BlockAdapter, Bottleneck, Prefix
from gptjax.model.attention import Attention
from gptjax.model.cache import LayerCache
from gptjax.model.cross import CrossAttention
from gptjax.model.experts import Experts, Extras
from gptjax.model.inputs import NOTHING_EARLIER, BlockInputs, Earlier, Memory
from gptjax.model.norms import NORMS
from gptjax.model.parameters import has_decoding_layout, linear, output_init, value, weight_init, zeros
from gptjax.ops.activations import ACTIVATIONS
from gptjax.ops.attention import split_heads
from gptjax.ops.elementwise import dropout
from gptjax.ops.linear import mlp


class MLP(nnx.Module):
    """Two linear layers with an activation between them, or three if it is gated.

    All weights are `[D, F]`, with the smaller dimension first: see `ops.matmul`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, width: int = 0):
        D, F = config.n_embd, width or config.mlp_size
        self.w_in = nnx.Param(weight_init(config)(rngs.params(), (D, F)))
        self.w_out = nnx.Param(output_init(config)(rngs.params(), (D, F)))
        self.b_in = zeros(F) if config.bias else None
        self.b_out = zeros(D) if config.bias else None
        self.w_gate = nnx.Param(weight_init(config)(rngs.params(), (D, F))) if config.gated else None
        self.b_gate = zeros(F) if config.gated and config.bias else None
        self.activation = config.activation

    def __call__(
        self,
        x_BTD: jax.Array,
        adapter: BlockAdapter | None = None,
        key: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the float32 output of the layer, plus `residual` if it is given."""
        adapted = adapter is not None and adapter.in_mlp
        if self.activation == "gelu" and self.w_gate is None and not has_decoding_layout(self.w_in) and not adapted:
            return mlp(x_BTD, self.w_in[...], value(self.b_in), self.w_out[...], value(self.b_out), residual)
        keys = (None, None) if key is None else jax.random.split(key)
        h_BTF = linear(x_BTD, self.w_in, self.b_in, x_BTD.dtype)
        if adapter is not None and adapter.mlp_w_in is not None:
            h_BTF = h_BTF + adapter.mlp_w_in(x_BTD, keys[0], x_BTD.dtype)
        activation = ACTIVATIONS[self.activation]
        if self.w_gate is None:
            h_BTF = activation(h_BTF)
        else:
            h_BTF = activation(linear(x_BTD, self.w_gate, self.b_gate, x_BTD.dtype)) * h_BTF
        y_BTD = linear(h_BTF, self.w_out, self.b_out, jnp.float32, outputs_first=True, residual=residual)
        if adapter is not None and adapter.mlp_w_out is not None:
            y_BTD = y_BTD + adapter.mlp_w_out(h_BTF, keys[1], jnp.float32)
        return y_BTD


class BlockKeys(NamedTuple):
    """Dropout keys of one block; None: no dropout."""

    attention: jax.Array | None = None
    after_attention: jax.Array | None = None
    after_mlp: jax.Array | None = None
    attention_bottleneck: jax.Array | None = None
    mlp_low_rank: jax.Array | None = None
    mlp_bottleneck: jax.Array | None = None


class Block(nnx.Module):
    """Attention and an MLP with their norms, which `model.norm_position` places before or after each of them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        norm, place = NORMS[config.norm], config.norm_position
        self.norm_1 = norm(config) if place != "output" else None
        self.attn = Attention(config, rngs=rngs)
        self.norm_cross = norm(config) if config.encoder_layers else None
        self.cross = CrossAttention(config, rngs=rngs) if config.encoder_layers else None
        self.norm_2 = norm(config) if place != "output" and config.parallel != "one_norm" else None
        shared = config.n_shared_expert * config.expert_size
        self.mlp = None if config.n_expert and not shared else MLP(config, rngs=rngs, width=shared)
        self.experts = Experts(config, rngs=rngs) if config.n_expert else None
        self.norm_out_1 = norm(config) if place in ("output", "sandwich") else None
        self.norm_out_2 = norm(config) if place in ("output", "sandwich") else None
        self.mix = nnx.Param(jnp.array([1.0, 0.0])) if config.residual_mix else None
        self.skip = nnx.Param(jnp.ones(())) if config.learned_skips else None
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        dtype: jax.typing.DTypeLike,
        inputs: BlockInputs,
        kind: str,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
        adapter: BlockAdapter | None = None,
        prefix: Prefix | None = None,
        earlier: Earlier = NOTHING_EARLIER,
    ) -> tuple[jax.Array, LayerCache | None, Extras, jax.Array | None]:
        """Applies the block to the float32 residual stream. Returns the new stream, the extended cache if one is given,
        named scalars for the loss, and the values of the first layer if the config uses them.

        Args:
            x_BTD: The residual stream.
            dtype: Of matmul operands.
            inputs: Positions and masks.
            kind: Kind of attention, see `ModelConfig.layer_kind`.
            key: Dropout key of this block; None: no dropout.
            cache: Keys and values of earlier tokens; None: `x_BTD` holds whole sequences.
            adapter: Adapter parameters of this block.
            prefix: Keys and values before every sequence. With them, attention weights have no dropout.
            earlier: Arrays of earlier layers.
        """
        keys = _keys(key, adapter)
        x_BTD = self.combined(x_BTD, earlier)
        new_cache, extras, values = cache, {}, None

        def attention(h_BTD: jax.Array, residual: jax.Array | None) -> jax.Array:
            nonlocal new_cache, values
            found = self.attn(
                *(h_BTD, inputs, kind, keys.attention, cache, adapter, prefix, residual), earlier.values_BTGEC
            )
            y_BTD, new_cache, values = found
            return y_BTD

        def mlp_layer(h_BTD: jax.Array, residual: jax.Array | None) -> jax.Array:
            nonlocal extras
            if self.experts is not None:
                y_BTD, extras = self.experts(h_BTD)
                residual = y_BTD if residual is None else residual + y_BTD
                if self.mlp is None:
                    return residual
            assert self.mlp is not None  # a block without experts has an MLP
            return self.mlp(h_BTD, adapter, keys.mlp_low_rank, residual)

        transform_1 = self._output_transform(
            self.norm_out_1, adapter and adapter.attn, keys[1], keys.attention_bottleneck, dtype
        )
        transform_2 = self._output_transform(
            self.norm_out_2, adapter and adapter.mlp, keys[2], keys.mlp_bottleneck, dtype
        )
        if self.config.parallel != "none":
            x_BTD, h_BTD = self._read(x_BTD, self.norm_1, dtype)
            stream_BTD = x_BTD
            x_BTD = self._add(x_BTD, h_BTD, attention, transform_1)
            if self.norm_2 is not None:
                stream_BTD, h_BTD = self._read(stream_BTD, self.norm_2, dtype)
            return self._add(x_BTD, h_BTD, mlp_layer, transform_2), new_cache, extras, values
        sublayers = [(attention, self.norm_1, transform_1), (mlp_layer, self.norm_2, transform_2)]
        if self.cross is not None and inputs.memory is not None:
            sublayers.insert(1, self._cross_sublayer(self.cross, inputs.memory, key, dtype))
        for sublayer, norm, transform in sublayers:
            if self.config.norm_position == "post":
                assert norm is not None
                x_BTD = norm(self._add(x_BTD, x_BTD.astype(dtype), sublayer, transform), jnp.float32)
            else:
                x_BTD, h_BTD = self._read(x_BTD, norm, dtype)
                x_BTD = self._add(x_BTD, h_BTD, sublayer, transform)
        return x_BTD, new_cache, extras, values

    def combined(self, x_BTD: jax.Array, earlier: Earlier) -> jax.Array:
        """The residual stream plus the terms of earlier layers that the block adds to it."""
        if self.skip is not None and earlier.skipped_BTD is not None:
            x_BTD = x_BTD + self.skip[...] * earlier.skipped_BTD
        if self.mix is not None and earlier.embedded_BTD is not None:
            r, s = self.mix[...]
            x_BTD = r * x_BTD + s * earlier.embedded_BTD
        return x_BTD

    def _cross_sublayer(self, cross: CrossAttention, memory: Memory, key: jax.Array | None, dtype):
        """Cross-attention, its norm, and the transform of its output."""
        weights_key, output_key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, 4))

        def attention(h_BTD: jax.Array, residual: jax.Array | None) -> jax.Array:
            return cross(h_BTD, memory, weights_key, residual)

        return attention, self.norm_cross, self._output_transform(None, None, output_key, None, dtype)

    def _read(self, x_BTD, norm, dtype):
        """The residual stream, and the input of a sublayer: its norm in `dtype`."""
        return (x_BTD, x_BTD.astype(dtype)) if norm is None else norm.with_residual(x_BTD, dtype)

    def _add(self, x_BTD, h_BTD, sublayer, transform):
        """Adds a sublayer's output to the residual stream. Without a transform, its last matmul does the addition."""
        return sublayer(h_BTD, x_BTD) if transform is None else x_BTD + transform(sublayer(h_BTD, None))

    def _output_transform(
        self, norm, bottleneck: Bottleneck | None, key, bottleneck_key, dtype
    ) -> Callable[[jax.Array], jax.Array] | None:
        """A function applied to a sublayer's output before the residual addition; None: the identity."""
        rate, scale = self.config.dropout, self.config.residual_scale
        drops = rate and key is not None
        if not drops and bottleneck is None and norm is None and scale == 1.0:
            return None

        def transform(y_BTD):
            if bottleneck is not None:
                y_BTD = bottleneck(y_BTD, dtype, bottleneck_key)
            if norm is not None:
                y_BTD = norm(y_BTD, jnp.float32)
            y_BTD = dropout(y_BTD, rate, key)
            return y_BTD if scale == 1.0 else scale * y_BTD

        return transform

    def prefix_of(self, prompt_1PD: jax.Array, dtype: jax.typing.DTypeLike, inputs: BlockInputs, kind: str) -> Prefix:
        """The keys and values of a prompt, to which the tokens after it attend."""
        _, h_1PD = self._read(prompt_1PD, self.norm_1 if self.config.norm_position != "post" else None, dtype)
        _, k_1PGC, v_1PGC = split_heads(self.attn.qkv(h_1PD, inputs.positions_BT, kind))
        return Prefix(k_1PGC[0], v_1PGC[0])


def _keys(key: jax.Array | None, adapter: BlockAdapter | None) -> BlockKeys:
    if key is None:
        return BlockKeys()
    own = jax.random.split(key, 3)
    added = (None,) * 3 if adapter is None else jax.random.split(jax.random.fold_in(key, 3), 3)
    return BlockKeys(*own, *added)
