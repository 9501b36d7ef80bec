"""Activations of the decoder for a text: the residual stream before and after every block, and all attention weights.
Slow; used to inspect a model.

Shape suffixes: B batch, T query position, S key position, D n_embd, H query heads, N layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.model import ModelConfig
from gptjax.errors import UserError
from gptjax.model.attention import attention_spec
from gptjax.model.gpt import GPT, for_decoding, skipped
from gptjax.model.inputs import BlockInputs, Earlier
from gptjax.ops.attention import split_heads
from gptjax.ops.attention_spec import NO_MASK
from gptjax.ops.plain_attention import attention_weights


class Inside(NamedTuple):
    """Float32 arrays of a forward pass."""

    streams_NBTD: jax.Array
    """The residual stream before the first block and after each block: `n_layer + 1` arrays."""
    weights_NBHTS: jax.Array
    """Attention weights by layer and head; they sum to 1 over S."""


def look_inside(config: ModelConfig, params: dict, tokens_BT: jax.Array) -> Inside:
    """Runs whole sequences that begin at position 0, in float32 and without dropout.

    Raises:
        UserError: The model has learned keys before the text, which belong to no token.
    """
    config, params = for_decoding(config, params)
    if config.adapter.kind == "prefix":
        raise UserError(
            "a model with a prompt or prefix adapter has keys that belong to no token; inspect its base model instead"
        )
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, {name: part for name, part in params.items() if name != "heads"})
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    inputs = BlockInputs(positions_BT)
    x_BTD = embedded_BTD = model.embedded(tokens_BT, positions_BT, None)
    streams, weights, values = [x_BTD], [], None
    for layer in range(config.n_layer):
        block, adapter = jax.tree.map(lambda leaf, layer=layer: leaf[layer], (model.blocks, model.adapters))
        kind = config.layer_kind(layer)
        earlier = Earlier(embedded_BTD, values, skipped(config, streams[1:]))
        read_BTD = block.combined(x_BTD, earlier)
        if config.norm_position != "post" and block.norm_1 is not None:
            read_BTD = block.norm_1(read_BTD, jnp.float32)
        q_BTHC, k_BSGC, _ = split_heads(block.attn.qkv(read_BTD, positions_BT, kind))
        bias = block.attn._bias(tokens_BT.shape[1])
        weights_BGRTS = attention_weights(attention_spec(config, kind), q_BTHC, k_BSGC, NO_MASK, bias)
        weights.append(weights_BGRTS.reshape(tokens_BT.shape[0], config.n_head, *weights_BGRTS.shape[-2:]))
        x_BTD, _, _, values = block(x_BTD, jnp.float32, inputs, kind, None, None, adapter, None, earlier)
        streams.append(x_BTD)
    return Inside(jnp.stack(streams), jnp.stack(weights))
