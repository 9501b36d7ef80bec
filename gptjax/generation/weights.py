"""Converts weights to their layout for decoding, which reads all weights per token and is limited by memory bandwidth.

Shape suffixes: V vocabulary, D n_embd.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax

from gptjax.config.model import ModelConfig
from gptjax.model.gpt import for_decoding, unembedding
from gptjax.ops.projection import Projection, WeightDtype, dequantized, make_projection

# Matrices of a block; True: stored as `[F, K]`, see `block.MLP`.
MATRICES = {
    ("attn", "w_qkv"): False,
    ("attn", "w_out"): False,
    ("mlp", "w_in"): False,
    ("mlp", "w_gate"): False,
    ("mlp", "w_out"): True,
}


class DecodingWeights(NamedTuple):
    """Weights of `extend` and of the output projection."""

    params: dict
    """For `gpt.extend`."""
    readout: Projection


def decoding_weights(config: ModelConfig, params: dict, dtype: WeightDtype, one_row: bool) -> DecodingWeights:
    """Converts the `params` of `for_decoding` for decoding one or several sequences at once. Call it outside `jit`.

    Each layer gets its own arrays, because slices of stacked blocks would be copied for every token. Matrices are
    converted to `dtype`. Padded vocabulary rows are removed from the output projection. Embeddings, norms and biases
    keep their dtype, because the model adds them in float32.
    """
    layers = _layers(params["blocks"], config.n_layer, dtype, one_row)
    w_VD = unembedding(params)
    if dtype == "float32" and w_VD.shape[0] == config.vocab_size and w_VD.dtype == dtype:
        readout = Projection(w_VD, None, config.vocab_size)  # no copy is needed
    else:
        readout = _readout(w_VD, config.vocab_size, _readout_dtype(dtype), one_row)
    trunk = {name: params[name] for name in ("embed", "norm_f", "head") if name in params}
    if "head" in trunk:  # its weight is the output projection
        trunk["head"] = {name: leaf for name, leaf in trunk["head"].items() if name != "w"}
    if "adapters" in params:
        trunk["adapters"] = {n: jax.tree.map(lambda x, n=n: x[n], params["adapters"]) for n in range(config.n_layer)}
    return DecodingWeights(trunk | {"blocks": dict(enumerate(layers))}, readout)


def _readout_dtype(dtype: WeightDtype) -> WeightDtype:
    """Dtype of the output projection: 8 bits beside blocks of 4, because errors in it reach the logits undamped."""
    return "int8" if dtype == "int4" else dtype


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _layers(blocks: dict, n_layer: int, dtype: Any, one_row: bool) -> list[dict]:
    def one(layer: int) -> dict:
        parts: dict = jax.tree.map(lambda leaf: leaf[layer], blocks)
        for (part, name), outputs_first in MATRICES.items():
            if name not in parts[part]:
                continue
            w = parts[part][name]
            parts[part][name] = make_projection(w.reshape(w.shape[0], -1), dtype, one_row, outputs_first)
        return parts

    return [one(layer) for layer in range(n_layer)]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _readout(w_VD: jax.Array, vocab_size: int, dtype: Any, one_row: bool) -> Projection:
    return make_projection(w_VD[:vocab_size], dtype, one_row, outputs_first=True)


def rounded_weights(config: ModelConfig, params: dict, dtype: WeightDtype) -> tuple[ModelConfig, dict]:
    """The model whose matrices are those that decoding in `dtype` multiplies by, as float32: to measure what they cost.

    The output projection is then a separate matrix, because embeddings are not rounded.
    """
    config, params = for_decoding(config, params)
    head = dict(params.get("head", {})) | {"w": _rounded(unembedding(params), _readout_dtype(dtype), True)}
    blocks = _rounded_blocks(params["blocks"], dtype)
    return dataclasses.replace(config, tied_embeddings=False), params | {"head": head, "blocks": blocks}


@functools.partial(jax.jit, static_argnums=1)
def _rounded_blocks(blocks: dict, dtype: WeightDtype) -> dict:
    rounded = {part: dict(blocks[part]) for part in blocks}
    for (part, name), outputs_first in MATRICES.items():
        if name in blocks[part]:
            rounded[part][name] = jax.lax.map(
                lambda w, first=outputs_first: _rounded(w, dtype, first), blocks[part][name]
            )
    return rounded


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(w: jax.Array, dtype: WeightDtype, outputs_first: bool) -> jax.Array:
    flat = w.reshape(w.shape[0], -1)
    w_KF = dequantized(make_projection(flat, dtype, False, outputs_first), flat.shape[1 if outputs_first else 0])
    return (w_KF.T if outputs_first else w_KF).reshape(w.shape)
