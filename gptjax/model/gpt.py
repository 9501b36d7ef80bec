"""The decoder as functions of `params`, a nested dict of arrays; Flax stays inside.

`params` holds `embed/tokens [V, D]`, `embed/positions [block_size, D]`, `blocks/...` with a leading layer axis on every
leaf, `norm_f/...`, and `head/w [V, D]` where the embeddings are not tied. With `model.adapter` also `adapters/...`,
with a leading layer axis, or `prompt/w [P, D]`. Other entries, as `heads`, are passed over. `blocks` may be several
stacks in order: then those that are constants cost no gradient.

Decoding takes the same with `blocks/0/...`, `blocks/1/...` instead of stacks, see `generation/weights.py`.

Shape suffixes: B batch, T position, D n_embd, V vocabulary (padded), P learned vectors.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.run import ModelConfig
from gptjax.config.task import AdapterConfig
from gptjax.model import cache as kv
from gptjax.model.adapters import BlockAdapter, Prefix, Prompt, merge_lora
from gptjax.model.cache import Cache
from gptjax.model.layers import INIT_STD, Block, LayerNorm, normal
from gptjax.model.stages import cut_layers, split_stacks, stream
from gptjax.ops.axes import HEADS, STAGES, axis_size, pin, pin_batch
from gptjax.ops.elementwise import dropout
from gptjax.ops.embedding import embedding
from gptjax.ops.linear import PRODUCT
from gptjax.ops.matmul import dot

# Products have a backward rule of their own, so JAX's policies for them do not see any; they go by a name.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
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
        tokens_VD, positions_SD = shared_rows(self.tokens[...]), pin(self.positions[...], None)
        x_BTD = embedding(tokens_VD, tokens_BT) + embedding(positions_SD, positions_BT)
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
        kind = config.adapter.kind
        self.prompt = Prompt(config, rngs=rngs) if kind == "prompt" else None
        drawn = jax.vmap(lambda rngs: BlockAdapter(config, rngs=rngs))
        self.adapters = None if kind in ("none", "prompt") else drawn(rngs.split(config.n_layer))
        self.n_layer = config.n_layer
        self.dropout = config.dropout

    def embedded(self, tokens_BT: jax.Array, positions_BT: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns what the first block reads, float32 `[B, T, D]`."""
        key = None if key is None else jax.random.fold_in(key, self.n_layer)
        return pin_batch(dropout(self.embed(pin_batch(tokens_BT), pin_batch(positions_BT)), self.dropout, key))

    def through_blocks(
        self,
        compute: Compute,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None,
        key: jax.Array | None,
        first: jax.Array | int = 0,
        lower: tuple[Block, ...] = (),
    ) -> jax.Array:
        """Returns what the blocks make of `x_BTD`; the lowest has number `first` among those of the whole model.

        `lower` are stacks of blocks that come before `self.blocks`, in a model without adapters.
        """
        dtype = jnp.dtype(compute.dtype)

        def apply(x_BTD, numbered_block):
            block, layer, adapter, prefix = numbered_block
            block_key = None if key is None else jax.random.fold_in(key, layer)
            return pin_batch(block(x_BTD, dtype, segments_BT, block_key, adapter, prefix)), None

        if compute.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[compute.remat])
        prefix = self.prefix(dtype)
        for blocks in (*lower, self.blocks):
            layers = first + jnp.arange(blocks.attn.w_qkv.shape[0])
            numbered = (blocks, layers, self.adapters, prefix)
            x_BTD, _ = jax.lax.scan(apply, x_BTD, numbered, unroll=compute.unroll or len(layers))
            first += len(layers)
        return x_BTD

    def prefix(self, dtype: jax.typing.DTypeLike) -> Prefix | None:
        """What stands before every text, with a leading layer axis: learned, or what the blocks make of a prompt."""
        if self.prompt is None:
            return None if self.adapters is None else self.adapters.prefix(dtype)

        def apply(prompt_1PD, block):
            return block(prompt_1PD, dtype, None, None), block.prefix_of(prompt_1PD, dtype)

        return jax.lax.scan(apply, self.prompt.w[...].astype(jnp.float32)[None], self.blocks)[1]


class Decoder(nnx.Module):
    """The same with a list of blocks, for decoding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.n_layer)])
        self.norm_f = LayerNorm(config)
        adapters = [BlockAdapter(config, rngs=rngs) for _ in range(config.n_layer)]
        self.adapters = None if config.adapter.kind == "none" else nnx.List(adapters)
        self.window = config.attention_window

    def __call__(self, tokens_BT: jax.Array, cache: Cache, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, Cache]:
        """Returns the normed hidden states `[B, T, D]` of tokens that follow those in `cache`, and the longer cache."""
        T = tokens_BT.shape[1]
        x_BTD = self.embed(tokens_BT, kv.positions(cache, T))
        visible_BTS = kv.visible_slots(cache, T, self.window)
        layers, adapters = [], self.adapters or [None] * len(cache.layers)
        for block, layer, adapter in zip(self.blocks, cache.layers, adapters, strict=True):
            x_BTD, layer = block.extend(x_BTD, dtype, layer, cache.used, visible_BTS, adapter)
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
    x_BTD = embed_tokens(config, params, tokens_BT, positions_BT, key=key)
    if axis_size(STAGES) > 1:
        x_BTD = _through_stages(config, params, x_BTD, segments_BT, compute, key)
    else:
        x_BTD = apply_blocks(config, params, x_BTD, segments_BT, compute=compute, key=key)
    return final_norm(config, params, x_BTD, compute=compute)


def embed_tokens(
    config: ModelConfig, params: dict, tokens_BT: jax.Array, positions_BT: jax.Array, *, key: jax.Array | None = None
) -> jax.Array:
    """The first piece of `hidden_states`: what the first block reads, float32 `[B, T, D]`."""
    return _merge(config, _top_stack(params)).embedded(tokens_BT, positions_BT, key)


def apply_blocks(
    config: ModelConfig,
    params: dict,
    x_BTD: jax.Array,
    segments_BT: jax.Array | None,
    *,
    compute: Compute = Compute(),
    key: jax.Array | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """The second piece: the residual stream after the blocks in `params`, the lowest of which has number `first`."""
    *stacks, _ = params["blocks"] if isinstance(params["blocks"], tuple) else (None,)
    lower = tuple(_merge(config, params | {"blocks": stack}).blocks for stack in stacks)
    return _merge(config, _top_stack(params)).through_blocks(compute, x_BTD, segments_BT, key, first, lower)


def final_norm(config: ModelConfig, params: dict, x_BTD: jax.Array, *, compute: Compute = Compute()) -> jax.Array:
    """The third piece: final hidden states in the compute dtype."""
    return _merge(config, _top_stack(params)).norm_f.beside(x_BTD, jnp.dtype(compute.dtype))[1]


def for_decoding(config: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
    """The same model without what decoding does not know: lora becomes part of the weights, a prompt a prefix."""
    if config.adapter.kind == "lora":
        return merge_lora(config, params)
    if config.adapter.kind == "prompt":
        prefix = _merge(config, params).prefix(jnp.float32)
        assert prefix is not None  # a prompt makes one
        adapter = AdapterConfig(kind="prefix", tokens=config.adapter.tokens)
        kept = {name: part for name, part in params.items() if name != "prompt"}
        return dataclasses.replace(config, adapter=adapter), kept | {"adapters": prefix._asdict()}
    return config, params


def extend(
    config: ModelConfig, params: dict, tokens_BT: jax.Array, cache: Cache, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, Cache]:
    """Runs tokens that follow those in `cache`; returns their hidden states `[B, T, D]` and the longer cache.

    `config` and `params` are as `for_decoding` returns them, with blocks and adapters one by one; their matrices may be
    `Projection`s.
    """
    return nnx.merge(_decoder_graphdef(config), params)(tokens_BT, cache, dtype)


def unembedding(params: dict) -> jax.Array:
    """The matrix `[V, D]` that reads out logits."""
    return params["head"]["w"] if "head" in params else params["embed"]["tokens"]


def shared_rows(w_VD: jax.Array) -> jax.Array:
    """A table of the vocabulary as it is used: whole rows, shared among the devices of `mesh.tensor`.

    Where these do not divide the rows, some are added that no token names and that the loss gives no probability.
    """
    short = -w_VD.shape[0] % axis_size(HEADS)
    return pin(jnp.pad(w_VD, ((0, short), (0, 0))) if short else w_VD, HEADS)


def logits(config: ModelConfig, params: dict, x_BTD: jax.Array) -> jax.Array:
    """Returns float32 logits `[B, T, vocab_size]` of hidden states; rows that only pad the embedding are cut off."""
    w_VD = unembedding(params)[: config.vocab_size].astype(x_BTD.dtype)
    return dot("btd,vd->btv", x_BTD, w_VD, jnp.float32)


def _through_stages(config, params, x_BTD, segments_BT, compute, key):
    """The second piece where layers are cut over devices; to train, `parallel/pipeline.py` has a better schedule."""
    assert key is None  # rows are streamed in parts, so dropout would not be that of one device
    stacks, rest = split_stacks(params)

    def stage(stacks, number, x_BTD, segments_BT):
        first = number * (config.n_layer // axis_size(STAGES))
        return apply_blocks(config, rest | stacks, x_BTD, segments_BT, compute=compute, first=first)

    return stream(stage, cut_layers(stacks), x_BTD, segments_BT)


def _top_stack(params: dict) -> dict:
    return params | {"blocks": params["blocks"][-1]} if isinstance(params["blocks"], tuple) else params


def _merge(config: ModelConfig, params: dict) -> GPT:
    return nnx.merge(_graphdef(config), {name: part for name, part in params.items() if name != "heads"})


@functools.cache
def _graphdef(config: ModelConfig) -> nnx.GraphDef[GPT]:
    return nnx.graphdef(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))


@functools.cache
def _decoder_graphdef(config: ModelConfig) -> nnx.GraphDef[Decoder]:
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
