"""The decoder as functions of `params`, a nested dict of arrays; Flax stays inside.

`params` holds `embed/tokens [V, D]`, `embed/positions [block_size, D]`, `blocks/...` with a leading layer axis on every
leaf, `norm_f/...`, and `head/w [V, D]` where the embeddings are not tied.

Decoding takes the same with `blocks/0/...`, `blocks/1/...` instead of stacks, see `generation/weights.py`.

Shape suffixes: B batch, T position, D n_embd, V vocabulary (padded).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import ModelConfig
from gptjax.model import cache as kv
from gptjax.model.cache import Cache
from gptjax.model.layers import INIT_STD, Block, LayerNorm, normal
from gptjax.ops.elementwise import dropout, embedding
from gptjax.ops.matmul import dot

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the same function is computed: precision, what is kept for the backward pass, how the loop is laid out."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: int = 0
    """Blocks per iteration of the loop over layers; 0: all."""


class Embed(nnx.Module):
    """Token and position embeddings."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.tokens = nnx.Param(normal(INIT_STD)(rngs.params(), (config.padded_vocab_size, config.n_embd)))
        self.positions = nnx.Param(normal(INIT_STD)(rngs.params(), (config.block_size, config.n_embd)))

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        x_BTD = embedding(self.tokens[...], tokens_BT) + embedding(self.positions[...], positions_BT)
        return x_BTD.astype(jnp.float32)


class Unembed(nnx.Module):
    """Reads out logits where the token embedding is not used for it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.w = nnx.Param(normal(INIT_STD)(rngs.params(), (config.padded_vocab_size, config.n_embd)))


class GPT(nnx.Module):
    """GPT-2 without its logits: embeddings, `n_layer` stacked blocks, final norm; a readout that is not tied."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs=rngs)
        self.blocks = jax.vmap(lambda rngs: Block(config, rngs=rngs))(rngs.split(config.n_layer))
        self.norm_f = LayerNorm(config)
        self.head = None if config.tied_embeddings else Unembed(config, rngs=rngs)
        self.n_layer = config.n_layer
        self.dropout = config.dropout

    def __call__(
        self,
        compute: Compute,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        """Returns the normed hidden states `[B, T, D]` in the compute dtype."""
        dtype = jnp.dtype(compute.dtype)
        embed_key = None if key is None else jax.random.fold_in(key, self.n_layer)
        x_BTD = dropout(self.embed(tokens_BT, positions_BT), self.dropout, embed_key)

        def apply(x_BTD, numbered_block):
            block, layer = numbered_block
            block_key = None if key is None else jax.random.fold_in(key, layer)
            return block(x_BTD, dtype, segments_BT, block_key), None

        if compute.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[compute.remat])
        x_BTD, _ = jax.lax.scan(
            apply, x_BTD, (self.blocks, jnp.arange(self.n_layer)), unroll=compute.unroll or self.n_layer
        )
        return self.norm_f(x_BTD, dtype)


class Decoder(nnx.Module):
    """The same with a list of blocks, for decoding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.norm_f = LayerNorm(config)
        self.window = config.attention_window

    def __call__(self, tokens_BT: jax.Array, cache: Cache, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, Cache]:
        """Returns the normed hidden states `[B, T, D]` of tokens that follow those in `cache`, and the longer cache."""
        T = tokens_BT.shape[1]
        x_BTD = self.embed(tokens_BT, kv.positions(cache, T))
        visible_BTS = kv.visible_slots(cache, T, self.window)
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x_BTD, layer = block.extend(x_BTD, dtype, layer, cache.used, visible_BTS)
            layers.append(layer)
        return self.norm_f(x_BTD, dtype), cache._replace(layers=tuple(layers), used=cache.used + T)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Draws float32 parameters as GPT-2 does: normal with deviation 0.02, biases zero, norms one."""
    return nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(key)), nnx.Param))


def hidden_states(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    compute: Compute = Compute(),
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns final hidden states `[B, T, D]` in the compute dtype.

    Args:
        config: Shape of the model.
        params: As `init_params` returns them.
        tokens_BT: Ids below `config.vocab_size`.
        positions_BT: Below `config.block_size`.
        segments_BT: Tokens attend within their segment; None: everywhere before them.
        compute: Precision and layout of the computation.
        key: Randomness for dropout; None: no dropout.
    """
    model = nnx.merge(_graphdef(config), params)
    return model(compute, tokens_BT, positions_BT, segments_BT, key)


def extend(
    config: ModelConfig, params: dict, tokens_BT: jax.Array, cache: Cache, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, Cache]:
    """Runs tokens that follow those in `cache`; returns their hidden states `[B, T, D]` and the longer cache.

    `params` holds blocks one by one; their matrices may be `Projection`s.
    """
    return nnx.merge(_decoder_graphdef(config), params)(tokens_BT, cache, dtype)


def unembedding(params: dict) -> jax.Array:
    """The matrix `[V, D]` that reads out logits."""
    return params["head"]["w"] if "head" in params else params["embed"]["tokens"]


def logits(config: ModelConfig, params: dict, x_BTD: jax.Array) -> jax.Array:
    """Returns float32 logits `[B, T, vocab_size]` of hidden states; rows that only pad the embedding are cut off."""
    w_VD = unembedding(params)[: config.vocab_size].astype(x_BTD.dtype)
    return dot("btd,vd->btv", x_BTD, w_VD, jnp.float32)


@functools.cache
def _graphdef(config: ModelConfig) -> nnx.GraphDef[GPT]:
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))


@functools.cache
def _decoder_graphdef(config: ModelConfig) -> nnx.GraphDef[Decoder]:
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
