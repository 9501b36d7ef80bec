"""Embeddings of texts: the hidden states of a layer, pooled over each text.

Shape suffixes: B texts in a batch, T position, D n_embd, E texts.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batches.labelled import TextBatch, TextSet, ordered_batches
from gptjax.config.model import ModelConfig
from gptjax.errors import UserError
from gptjax.generation.decode import DecodingModel
from gptjax.model.cache import init_cache
from gptjax.model.gpt import Compute, apply_blocks, embed_tokens, extend, for_decoding
from gptjax.model.heads import pool
from gptjax.model.loss import batch_states, inputs_of
from gptjax.text.tokenizers.base import Tokenizer

Pooling = Literal["mean", "last"]
LISTS = ("blocks", "adapters")
"""Parameters that decoding holds layer by layer."""
BATCH = 16
"""Default number of texts in a batch."""


@dataclasses.dataclass(frozen=True)
class EmbeddingOptions:
    """Which layer to pool, and how."""

    layer: int = -1
    """Hidden states after this many blocks. 0: the token embeddings; -1: after all blocks and the final norm."""
    pooling: Pooling = "mean"
    """The mean over the text's positions, or the last position."""
    normalized: bool = False
    """Scale vectors to length 1."""


def check_layer(model: ModelConfig, layer: int) -> None:
    """Checks that the model has this layer and is no encoder-decoder.

    Raises:
        UserError: It has not; the message names the range.
    """
    if model.encoder_layers:
        raise UserError(f"model.encoder_layers={model.encoder_layers}: its states need a source and a target")
    if not -1 <= layer <= model.n_layer:
        raise UserError(f"layer={layer} must lie in [-1, {model.n_layer}]: model.n_layer={model.n_layer}")


def document(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """The ids of a text, int32, after an end-of-text token (as in training) if the tokenizer has one."""
    start = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return np.concatenate([np.array(start, np.int32), ids.astype(np.int32)])


def embed_ids(
    model: ModelConfig,
    params: dict,
    texts: Sequence[np.ndarray],
    options: EmbeddingOptions,
    compute: Compute,
    batch_size: int = BATCH,
) -> np.ndarray:
    """Returns one float32 vector for each text, `[E, D]`.

    Args:
        model: Shape of the model.
        params: As `init_params` returns them.
        texts: Token ids of each text, 1 to `block_size` of them.
        options: Layer and pooling.
        compute: How the forward pass is computed.
        batch_size: Texts in a batch; texts of similar length share a batch.

    Raises:
        UserError: The model does not have this layer.
    """
    check_layer(model, options.layer)
    return _in_batches(model, functools.partial(_compiled(model, options, compute), params), texts, batch_size)


def embed_decoding(model: DecodingModel, texts: Sequence[np.ndarray], options: EmbeddingOptions) -> np.ndarray:
    """Returns the vectors of `embed_ids`, with the weights of a model in its layout for decoding.

    Raises:
        UserError: The model has no such layer.
    """
    check_layer(model.config, options.layer)
    embed = functools.partial(_embed_decoding, model.config, model.dtype, options, model.weights.params)
    return _in_batches(model.config, embed, texts, BATCH)


def _in_batches(
    model: ModelConfig, embed: Callable[[TextBatch], jax.Array], texts: Sequence[np.ndarray], batch_size: int
) -> np.ndarray:
    count = len(texts)
    text_set = TextSet(texts, np.full(count, -1, np.int32), np.zeros(count, bool), model.block_size)
    vectors_ED = np.zeros((count, model.n_embd), np.float32)
    for numbers, batch in ordered_batches(text_set, batch_size if count > 1 else 1):
        found_BD = np.asarray(embed(batch))
        vectors_ED[numbers[numbers >= 0]] = found_BD[numbers >= 0]
    return vectors_ED


@functools.cache
def _compiled(
    model: ModelConfig, options: EmbeddingOptions, compute: Compute
) -> Callable[[dict, TextBatch], jax.Array]:
    return jax.jit(functools.partial(_embed, model, options, compute))


def _embed(
    model: ModelConfig, options: EmbeddingOptions, compute: Compute, params: dict, batch: TextBatch
) -> jax.Array:
    if options.layer == -1:
        x_BTD = batch_states(model, compute, params, batch)
    else:
        inputs = inputs_of(model, batch)
        x_BTD = embed_tokens(model, params, batch.inputs, inputs.positions_BT)
        if options.layer:
            if model.adapter.kind == "prompt":  # its keys and values in a layer are made by all layers below
                model, params = for_decoding(model, params)
            x_BTD, _ = apply_blocks(model, _first_layers(params, options.layer), x_BTD, inputs, compute=compute)
    return _pooled(x_BTD, batch, options)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embed_decoding(
    model: ModelConfig, dtype: str, options: EmbeddingOptions, params: dict, batch: TextBatch
) -> jax.Array:
    count = model.n_layer if options.layer == -1 else options.layer
    tokens_BT = batch.inputs
    kept = {name: {n: part[n] for n in range(count)} for name, part in params.items() if name in LISTS}
    cache = init_cache(model, jnp.zeros(tokens_BT.shape[0], jnp.int32), tokens_BT.shape[1], dtype)
    cache = cache._replace(layers=cache.layers[:count])
    x_BTD, _ = extend(model, params | kept, tokens_BT, cache, dtype, final_norm=options.layer == -1)
    return _pooled(x_BTD, batch, options)


def _pooled(x_BTD: jax.Array, batch: TextBatch, options: EmbeddingOptions) -> jax.Array:
    vectors_BD = pool(x_BTD, batch.lengths, options.pooling)
    if options.normalized:
        vectors_BD = vectors_BD / jnp.maximum(jnp.linalg.norm(vectors_BD, axis=1, keepdims=True), 1e-12)
    return vectors_BD


def _first_layers(params: dict, count: int) -> dict:
    """Parameters with only the first `count` layers."""

    def first(stacked: Any, count: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[:count], stacked)

    kept = params | {"adapters": first(params["adapters"], count)} if "adapters" in params else dict(params)
    if not isinstance(params["blocks"], tuple):
        return kept | {"blocks": first(params["blocks"], count)}
    stacks = []
    for stack in params["blocks"]:
        if count > 0:
            stacks.append(first(stack, count))
            count -= len(jax.tree.leaves(stack)[0])
    return kept | {"blocks": tuple(stacks)}
