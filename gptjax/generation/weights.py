"""Weights laid out for decoding, where all of them are read for each token and memory sets the pace.

Shape suffixes: V vocabulary, D n_embd.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.gpt import unembedding

MATRICES = (("attn", "w_qkv"), ("attn", "w_out"), ("mlp", "w_in"), ("mlp", "w_out"))


def decoding_weights(config: ModelConfig, params: dict, dtype: jax.typing.DTypeLike) -> dict:
    """Turns `params` into the form that `stacked_params` takes; call it once, outside `jit`.

    Blocks are split into layers (a slice of stacked blocks would be copied for every token), what matrix products
    read is cast to `dtype`, and the readout is a matrix of its own, without rows that pad the vocabulary. Embeddings,
    norms and biases keep their dtype, as the model adds them in float32.
    """
    w_VD = unembedding(params)
    if w_VD.shape[0] != config.vocab_size or w_VD.dtype != dtype:
        w_VD = w_VD[: config.vocab_size].astype(dtype)
    layers = _split(params["blocks"], config.n_layer, jnp.dtype(dtype))
    return {"embed": params["embed"], "blocks": layers, "norm_f": params["norm_f"], "head": {"w": w_VD}}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _split(blocks: dict, n_layer: int, dtype: jnp.dtype) -> list[dict]:
    blocks = {part: dict(leaves) for part, leaves in blocks.items()}
    for part, name in MATRICES:
        blocks[part][name] = blocks[part][name].astype(dtype)
    return [jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks) for layer in range(n_layer)]


def decoding_config(config: ModelConfig) -> ModelConfig:
    """Returns the config that fits `stacked_params`: the same function, with a readout of its own."""
    return dataclasses.replace(config, tied_embeddings=False)


def stacked_params(weights: dict) -> dict:
    """Turns `decoding_weights` into params, inside `jit`: there, slices of a stack cost nothing."""
    return weights | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights["blocks"])}
