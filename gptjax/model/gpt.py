"""The decoder as functions of `params`, a nested dict of arrays. Flax is used only inside.

`params` has these entries:

- `embed/tokens [V, D]`, `embed/positions [block_size, D]`
- `blocks/...`, every leaf with a leading layer axis. `blocks` may also be a tuple of several stacks, in order: no
  gradient is computed for stacks that are constants.
- `norm_f/...`, and `head/w [V, D]` if the embeddings are not tied
- with `model.adapter`: `adapters/...` with a leading layer axis, or `prompt/w [P, D]`
- with `model.encoder_layers`: `encoder/blocks/...` and `encoder/norm_f/...`, which `encode` reads

Other entries, such as `heads`, are ignored. For decoding, `blocks/0/...`, `blocks/1/...` replace the stacks, see
`generation/weights.py`.

Shape suffixes: B batch, T position, D n_embd, V vocabulary (padded), P learned vectors.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.model import ModelConfig
from gptjax.config.task import AdapterConfig
from gptjax.model import cache as kv
from gptjax.model.adapters import BlockAdapter, Prefix, Prompt, merge_lora
from gptjax.model.attention import attention_spec
from gptjax.model.block import Block
from gptjax.model.cache import Cache, LayerCache
from gptjax.model.experts import Extras
from gptjax.model.inputs import BlockInputs, Earlier, Memory
from gptjax.model.layer_scan import scan_layers, unstack_layers
from gptjax.model.norms import NORMS, Norm
from gptjax.model.parameters import INIT_STD, normal, zeros
from gptjax.model.positions import POSITIONS
from gptjax.model.stages import split_into_stages, split_stacks, stream
from gptjax.ops.attention_spec import Mask
from gptjax.ops.axes import HEADS, STAGES, axis_size, constrain_batch, constrain_sharding
from gptjax.ops.elementwise import dropout
from gptjax.ops.embedding import embedding
from gptjax.ops.linear import MATMUL_OUTPUT
from gptjax.ops.matmul import dot

M = TypeVar("M", bound=nnx.Module)

# Matmuls have a custom backward rule, so JAX's checkpoint policies for dots do not match them. The name does.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(MATMUL_OUTPUT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the forward pass is computed: precision, rematerialisation, unrolling of the loop over layers."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: int = 0
    """Blocks per iteration of the loop over layers; 0: all."""


class Embed(nnx.Module):
    """Token embeddings plus position embeddings, if the position method has them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        table = config.padded_vocab_size, config.n_embd
        self.tokens = nnx.Param(normal(INIT_STD if config.init == "gpt2" else 1.0)(rngs.params(), table))
        learned = POSITIONS[config.positions].embedding_table
        places = config.block_size, config.n_embd
        self.positions = nnx.Param(normal(INIT_STD)(rngs.params(), places)) if learned else None
        self.norm = NORMS[config.norm](config) if config.embedding_norm else None
        self.config = config

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        config, add = self.config, POSITIONS[self.config.positions].add
        x_BTD = embedding(shared_rows(self.tokens[...]), tokens_BT)
        if config.embedding_scale != 1.0:
            x_BTD = x_BTD * config.embedding_scale
        if self.positions is not None:
            x_BTD = x_BTD + embedding(constrain_sharding(self.positions[...], None), positions_BT)
        if add is not None:
            x_BTD = x_BTD + add(config, positions_BT)
        x_BTD = x_BTD.astype(jnp.float32)
        return x_BTD if self.norm is None else self.norm(x_BTD, jnp.float32)


class Unembed(nnx.Module):
    """Output projection: its weight if it is not tied to the token embedding, and its bias if it has one."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = config.padded_vocab_size, config.n_embd
        init = normal(INIT_STD) if config.init == "gpt2" else jax.nn.initializers.zeros
        self.w = None if config.tied_embeddings else nnx.Param(init(rngs.params(), shape))
        self.bias = zeros(config.padded_vocab_size) if config.output_bias else None


class GPT(nnx.Module):
    """The decoder up to its hidden states: embeddings, `n_layer` stacked blocks, final norm. It also holds the output
    projection if that is not tied.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs=rngs)
        self.blocks = jax.vmap(lambda rngs: Block(config, rngs=rngs))(rngs.split(config.n_layer))
        self.norm_f = final_norm_module(config)
        self.head = Unembed(config, rngs=rngs) if has_head(config) else None
        kind = config.adapter.kind
        self.prompt = Prompt(config, rngs=rngs) if kind == "prompt" else None
        drawn = jax.vmap(lambda rngs: BlockAdapter(config, rngs=rngs))
        self.adapters = None if kind in ("none", "prompt") else drawn(rngs.split(config.n_layer))
        self.config = config

    def embedded(self, tokens_BT: jax.Array, positions_BT: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the input of the first block, float32 `[B, T, D]`."""
        key = None if key is None else jax.random.fold_in(key, self.config.n_layer)
        x_BTD = self.embed(constrain_batch(tokens_BT), constrain_batch(positions_BT))
        return constrain_batch(dropout(x_BTD, self.config.dropout, key))

    def through_blocks(
        self,
        compute: Compute,
        x_BTD: jax.Array,
        inputs: BlockInputs,
        key: jax.Array | None,
        first: jax.Array | int = 0,
        lower: tuple[Block, ...] = (),
        layer_weights_L: jax.Array | None = None,
    ) -> tuple[jax.Array, Extras]:
        """Returns the residual stream after the blocks, and the layers' named scalars for the loss, averaged.

        `first` is the layer number of the first block in the whole model. `lower` are stacks of blocks that come before
        `self.blocks`, in a model without adapters. With `layer_weights_L`, of the embeddings and of each block, the
        result is the weighted sum of the normalised residual streams in float32, in place of the last one.
        """
        dtype, embedded_BTD = jnp.dtype(compute.dtype), x_BTD if self.config.residual_mix else None

        def weighted(weight, x_BTD):
            return weight * (x_BTD if self.norm_f is None else self.norm_f(x_BTD, jnp.float32))

        def apply(kind, stream, numbered_block, values=None, skipped_BTD=None):
            (x_BTD, sum_BTD), (block, layer, adapter, prefix, weight) = stream, numbered_block
            block_key = None if key is None else jax.random.fold_in(key, layer)
            earlier = Earlier(embedded_BTD, values, skipped_BTD)
            y_BTD, _, extras, values = block(x_BTD, dtype, inputs, kind, block_key, None, adapter, prefix, earlier)
            if sum_BTD is not None:
                sum_BTD = sum_BTD + weighted(weight, y_BTD)
            return (constrain_batch(y_BTD), sum_BTD), (extras, values)

        if compute.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[compute.remat], static_argnums=0)
        prefix, totals, outputs, values = self.prefix(dtype), [], [], None
        stream = x_BTD, None if layer_weights_L is None else weighted(layer_weights_L[0], x_BTD)
        for blocks in (*lower, self.blocks):
            count = blocks.attn.w_qkv.shape[0]
            layers = first + jnp.arange(count)
            weights = None if layer_weights_L is None else layer_weights_L[layers + 1]
            numbered = (blocks, layers, self.adapters, prefix, weights)
            kinds = self._kinds(first, count)
            first += count
            if not (self.config.value_residual or self.config.learned_skips):
                stream, (total, _) = scan_layers(apply, stream, numbered, kinds, compute.unroll)
                totals.append(total)
                continue
            for kind, layer in zip(kinds, unstack_layers(numbered, count), strict=True):
                stream, (total, values) = apply(kind, stream, layer, values, skipped(self.config, outputs))
                outputs.append(stream[0])
                totals.append(total)
        extras = jax.tree.map(lambda *parts: sum(parts) / self.config.n_layer, *totals)
        x_BTD, sum_BTD = stream
        return (x_BTD if sum_BTD is None else sum_BTD), extras

    def prefix(self, dtype: jax.typing.DTypeLike) -> Prefix | None:
        """Keys and values before every text, with a leading layer axis: those of a prefix adapter, or those that the
        blocks compute from a prompt. A prompt has no positions; rotary embeddings use position 0 for it.
        """
        if self.prompt is None:
            return None if self.adapters is None else self.adapters.prefix(dtype)
        inputs = BlockInputs(jnp.zeros((1, self.prompt.w.shape[0]), jnp.int32))
        x_1PD, prefixes = self.prompt.w[...].astype(jnp.float32)[None], []
        for layer, kind in enumerate(self._kinds(0, self.config.n_layer)):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], self.blocks)
            prefixes.append(block.prefix_of(x_1PD, dtype, inputs, kind))
            x_1PD, *_ = block(x_1PD, dtype, inputs, kind)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *prefixes)

    def _kinds(self, first: jax.Array | int, count: int) -> tuple[str, ...]:
        """The kinds of `count` layers. `parallel.fits` makes each stage begin at the start of the pattern."""
        start = first if isinstance(first, int) else 0
        return tuple(self.config.layer_kind(start + layer) for layer in range(count))


class DecoderEnds(nnx.Module):
    """What decoding runs before and after the blocks."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs=rngs)
        self.norm_f = final_norm_module(config)


def skipped(config: ModelConfig, outputs: list[jax.Array]) -> jax.Array | None:
    """The output of a lower layer that the layer after these outputs adds to what it reads; None: it adds none."""
    paired = config.n_layer - 1 - len(outputs)
    return outputs[paired] if config.learned_skips and paired < len(outputs) else None


def final_norm_module(config: ModelConfig) -> Norm | None:
    """The norm after the last block; None for post-norm models, whose blocks end with a norm."""
    return None if config.norm_position == "post" else NORMS[config.norm](config)


def has_head(config: ModelConfig) -> bool:
    """Whether the output projection has its own parameters."""
    return not config.tied_embeddings or config.output_bias


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Initializes float32 parameters as `config.init` says; biases are 0 and norm scales 1."""
    params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(key)), nnx.Param))
    if config.encoder_layers:
        encoder = init_params(encoder_model(config), jax.random.fold_in(key, 1))
        params["encoder"] = {name: encoder[name] for name in ("blocks", "norm_f") if name in encoder}
    return params


def encoder_model(config: ModelConfig) -> ModelConfig:
    """The config of the encoder: the same blocks, bidirectional and without cross-attention."""
    return dataclasses.replace(config, n_layer=config.encoder_layers, encoder_layers=0, bidirectional=True)


def encode(
    config: ModelConfig,
    params: dict,
    source_BS: jax.Array,
    lengths_B: jax.Array,
    *,
    compute: Compute = Compute(),
    key: jax.Array | None = None,
) -> Memory:
    """Encodes sources that are padded at their end. The embeddings are the decoder's."""
    positions_BS = jax.lax.broadcasted_iota("int32", source_BS.shape, 1)
    keys_BS = positions_BS < lengths_B[:, None]
    inputs, own = BlockInputs(positions_BS, Mask(keys_BS=keys_BS)), {"embed": params["embed"], **params["encoder"]}
    key = None if key is None else jax.random.fold_in(key, config.n_layer + 1)
    states_BSD, _ = states_and_extras(encoder_model(config), own, source_BS, inputs, compute=compute, key=key)
    return Memory(keys_BS, states_BSD)


def layer_memories(config: ModelConfig, params: dict, memory: Memory) -> tuple[Memory, ...]:
    """Keys and values of the source in each layer of a decoder, computed once for all target tokens. `params` are those
    of `init_params`.
    """
    blocks = _merge(config, params).blocks
    layers = (jax.tree.map(lambda leaf, n=n: leaf[n], blocks) for n in range(config.n_layer))
    return tuple(memory._replace(states_BSD=None, heads=layer.cross.heads(memory.states_BSD)) for layer in layers)


def hidden_states(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    ahead_BT: jax.Array | None = None,
    compute: Compute = Compute(),
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns final hidden states `[B, T, D]` in the compute dtype.

    Args:
        config: Shape of the model.
        params: As `init_params` returns them.
        tokens_BT: Ids below `config.vocab_size`.
        positions_BT: Below `config.block_size`.
        segments_BT: Tokens attend only within their segment; None: one segment.
        ahead_BT: True for tokens to which earlier ones may also attend; None: no such tokens.
        compute: How the forward pass is computed.
        key: Dropout key; None: no dropout.
    """
    inputs = BlockInputs(positions_BT, Mask(segments_BT, ahead_BT))
    return states_and_extras(config, params, tokens_BT, inputs, compute=compute, key=key)[0]


def states_and_extras(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    inputs: BlockInputs,
    *,
    compute: Compute = Compute(),
    key: jax.Array | None = None,
    layer_weights_L: jax.Array | None = None,
) -> tuple[jax.Array, Extras]:
    """Like `hidden_states`, but also returns the layers' named scalars for the loss, averaged over layers. With
    `layer_weights_L` the states are those of all layers, normalised, times these weights (`through_blocks`).
    """
    x_BTD, extras = embed_tokens(config, params, tokens_BT, inputs.positions_BT, key=key), {}
    if axis_size(STAGES) > 1:
        x_BTD = _through_stages(config, params, x_BTD, inputs, compute, key)
    else:
        x_BTD, extras = apply_blocks(
            config, params, x_BTD, inputs, compute=compute, key=key, layer_weights_L=layer_weights_L
        )
    if layer_weights_L is not None:
        return x_BTD.astype(compute.dtype), extras
    return final_norm(config, params, x_BTD, compute=compute), extras


def embed_tokens(
    config: ModelConfig, params: dict, tokens_BT: jax.Array, positions_BT: jax.Array, *, key: jax.Array | None = None
) -> jax.Array:
    """The first part of `hidden_states`: the input of the first block, float32 `[B, T, D]`."""
    return _merge(config, _top_stack(params)).embedded(tokens_BT, positions_BT, key)


def apply_blocks(
    config: ModelConfig,
    params: dict,
    x_BTD: jax.Array,
    inputs: BlockInputs,
    *,
    compute: Compute = Compute(),
    key: jax.Array | None = None,
    first: jax.Array | int = 0,
    layer_weights_L: jax.Array | None = None,
) -> tuple[jax.Array, Extras]:
    """The second part: the residual stream after the blocks in `params`, and the layers' named scalars. `first` is the
    layer number of the first of these blocks; `layer_weights_L` as of `GPT.through_blocks`.
    """
    *stacks, _ = params["blocks"] if isinstance(params["blocks"], tuple) else (None,)
    lower = tuple(_merge(config, params | {"blocks": stack}).blocks for stack in stacks)
    return _merge(config, _top_stack(params)).through_blocks(compute, x_BTD, inputs, key, first, lower, layer_weights_L)


def final_norm(config: ModelConfig, params: dict, x_BTD: jax.Array, *, compute: Compute = Compute()) -> jax.Array:
    """The third part: final hidden states in the compute dtype."""
    norm = _merge(config, _top_stack(params)).norm_f
    dtype = jnp.dtype(compute.dtype)
    return x_BTD.astype(dtype) if norm is None else norm.with_residual(x_BTD, dtype)[1]


def for_decoding(config: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
    """The same function with the adapters that decoding supports: merges LoRA into the weights, and replaces a prompt
    by the prefix of its keys and values.
    """
    if config.adapter.kind == "lora":
        return merge_lora(config, params)
    if config.adapter.kind == "prompt":
        prefix = _merge(config, params).prefix(jnp.float32)
        assert prefix is not None  # a prompt adapter always gives one
        adapter = AdapterConfig(kind="prefix", tokens=config.adapter.tokens)
        kept = {name: part for name, part in params.items() if name != "prompt"}
        return dataclasses.replace(config, adapter=adapter), kept | {"adapters": prefix._asdict()}
    return config, params


def extend(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    cache: Cache,
    dtype: jax.typing.DTypeLike,
    prefix: bool = False,
    final_norm: bool = True,
) -> tuple[jax.Array, Cache]:
    """Runs tokens that follow those in `cache`; returns their final hidden states `[B, T, D]` and the extended cache.
    With `prefix`, the tokens also attend to later ones. Without `final_norm`, the states are those of the last block.

    `config` and `params` are those of `for_decoding`, with lists of blocks and adapters instead of stacks; their
    matrices may be `Projection`s.
    """
    T = tokens_BT.shape[1]
    positions_BT = kv.positions(cache, T)
    inputs, views = BlockInputs(positions_BT), {}
    for number in range(len(cache.layers)):
        if (kind := config.layer_kind(number)) not in views:
            views[kind] = kv.layer_view(config, cache, T, number, attention_spec(config, kind), prefix)
    ends = nnx.merge(
        _graphdef(DecoderEnds, config), {name: params[name] for name in ("embed", "norm_f") if name in params}
    )
    x_BTD = embedded_BTD = ends.embed(tokens_BT, positions_BT)
    layers, outputs, values, adapters = [], [], None, params.get("adapters")
    for number, layer in enumerate(cache.layers):
        memory, kind = None if cache.memory is None else cache.memory[number], config.layer_kind(number)
        x_BTD, layer, values = _extend_block(
            *(config, kind, dtype, params["blocks"][number], None if adapters is None else adapters[number]),
            *(x_BTD, inputs._replace(memory=memory, slots=views[kind]), layer),
            Earlier(embedded_BTD if config.residual_mix else None, values, skipped(config, outputs)),
        )
        layers.append(layer)
        outputs.append(x_BTD)
    x_BTD = ends.norm_f(x_BTD, dtype) if final_norm and ends.norm_f is not None else x_BTD.astype(dtype)
    return x_BTD, cache._replace(layers=tuple(layers), used=cache.used + T)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _extend_block(
    config: ModelConfig,
    kind: str,
    dtype: jax.typing.DTypeLike,
    params: dict,
    adapter_params: dict | None,
    x_BTD: jax.Array,
    inputs: BlockInputs,
    layer: LayerCache,
    earlier: Earlier,
) -> tuple[jax.Array, LayerCache, jax.Array | None]:
    """Applies one block. JAX traces it once for all layers of a kind, so deep models start about as fast as others."""
    block = nnx.merge(_graphdef(Block, config), params)
    adapter = None if adapter_params is None else nnx.merge(_graphdef(BlockAdapter, config), adapter_params)
    learned = None if adapter is None else adapter.prefix(dtype)
    x_BTD, new_layer, _, values = block(x_BTD, dtype, inputs, kind, None, layer, adapter, learned, earlier)
    assert new_layer is not None  # as one was given
    return x_BTD, new_layer, values


def unembedding(params: dict) -> jax.Array:
    """The matrix `[V, D]` of the output projection."""
    return params["head"]["w"] if "w" in params.get("head", {}) else params["embed"]["tokens"]


def shared_rows(w_VD: jax.Array) -> jax.Array:
    """Shards the rows of a vocabulary table over `mesh.tensor`, where the table is used.

    If the number of devices does not divide the rows, rows are added. No token has their ids, and the loss gives them
    no probability.
    """
    short = -w_VD.shape[0] % axis_size(HEADS)
    return constrain_sharding(jnp.pad(w_VD, ((0, short), (0, 0))) if short else w_VD, HEADS)


def logits(config: ModelConfig, params: dict, x_BTD: jax.Array) -> jax.Array:
    """Returns float32 logits `[B, T, vocab_size]` of hidden states, without those of padded vocabulary rows."""
    w_VD = unembedding(params)[: config.vocab_size].astype(x_BTD.dtype)
    logits_BTV = dot("btd,vd->btv", x_BTD, w_VD, jnp.float32)
    return finish_logits(config, params, logits_BTV)


def finish_logits(config: ModelConfig, params: dict, logits: jax.Array) -> jax.Array:
    """Applies the output bias, scale and soft cap of the config to float32 logits `[..., vocab_size]`."""
    if config.output_bias:
        bias_V = params["head"]["bias"][: config.vocab_size].astype(jnp.float32)
        logits = logits + bias_V.reshape((1,) * (logits.ndim - 1) + (-1,))
    if config.logit_factor != 1.0:
        logits = logits * config.logit_factor
    return config.logit_softcap * jnp.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


def _through_stages(config, params, x_BTD, inputs, compute, key):
    """The second part if layers are sharded over stages. Training has a faster one: `parallel/pipeline.py`."""
    assert key is None  # sequences are streamed in micro-batches, so dropout would differ from that on one device
    stacks, rest = split_stacks(params)

    def stage(stacks, number, x_BTD, inputs):
        first = number * (config.n_layer // axis_size(STAGES))
        return apply_blocks(config, rest | stacks, x_BTD, inputs, compute=compute, first=first)[0]

    return stream(stage, split_into_stages(stacks), x_BTD, inputs)


def _top_stack(params: dict) -> dict:
    return params | {"blocks": params["blocks"][-1]} if isinstance(params["blocks"], tuple) else params


def _merge(config: ModelConfig, params: dict) -> GPT:
    others = "heads", "encoder"
    return nnx.merge(_graphdef(GPT, config), {name: part for name, part in params.items() if name not in others})


@functools.cache
def _graphdef(module: Callable[..., M], config: ModelConfig) -> nnx.GraphDef[M]:
    return nnx.graphdef(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
