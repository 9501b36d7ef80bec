"""Weights laid out for decoding, where each is read once per token and memory is the limit.

Shape suffixes: V vocabulary, D n_embd.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.gpt import unembedding

MATRICES = (("attn", "w_qkv"), ("attn", "w_out"), ("mlp", "w_in"), ("mlp", "w_out"))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def decoding_weights(config: ModelConfig, params: dict, dtype: jax.typing.DTypeLike) -> dict:
    """Copies `params` into the form that `stacked_params` takes.

    Blocks are split into layers (a slice of stacked blocks would be copied for every token), what matrix products
    read is cast to `dtype`, and the readout is a matrix of its own, without rows that pad the vocabulary. Embeddings,
    norms and biases keep their dtype, as the model adds them in float32.
    """
    blocks = {part: dict(leaves) for part, leaves in params["blocks"].items()}
    for part, name in MATRICES:
        blocks[part][name] = blocks[part][name].astype(dtype)
    return {
        "embed": params["embed"],
        "blocks": [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(config.n_layer)],
        "norm_f": params["norm_f"],
        "head": {"w": unembedding(params)[: config.vocab_size].astype(dtype)},
    }


def decoding_config(config: ModelConfig) -> ModelConfig:
    """Returns the config that fits `stacked_params`: the same function, with a readout of its own."""
    return dataclasses.replace(config, tied_embeddings=False)


def stacked_params(weights: dict) -> dict:
    """Turns `decoding_weights` into params, inside `jit`: there, slices of a stack cost nothing."""
    return weights | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights["blocks"])}
