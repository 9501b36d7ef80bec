"""Measurements on one text: attention, probabilities, candidates for the next token, and the logit lens.

Shape suffixes: T position, K candidate, N layer, H head, S key position, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.model import gpt
from gptjax.model.inside import look_inside

CANDIDATES, LENS = 10, 3
"""Number of most likely next tokens that are stored for the model, and for each layer of the logit lens."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Measurements on a text of T tokens. Entry t of `top_*` and `lens_*` is about token t + 1."""

    tokens_T: np.ndarray
    weights_NHTS: np.ndarray
    log_probabilities_T: np.ndarray
    """Loss of each token given the earlier ones, in nats; NaN for the first token."""
    ranks_T: np.ndarray
    """How many tokens were more likely; -1 for the first token."""
    top_tokens_TK: np.ndarray
    top_logits_TK: np.ndarray
    top_probabilities_TK: np.ndarray
    lens_tokens_NTK: np.ndarray
    """Most likely tokens if the final norm and output projection are applied to the residual stream before the first
    block and after each block (the logit lens: nostalgebraist, 2020)."""
    lens_probabilities_NTK: np.ndarray
    lens_next_NT: np.ndarray
    """Probability of the next token of the text; NaN at its end."""
    entropies_NH: np.ndarray
    """Mean entropy of the attention weights, in nats."""


def inspect_text(config: ModelConfig, params: dict, tokens_T: np.ndarray) -> Inspection:
    """Runs the model on one text in float32."""
    T, count = len(tokens_T), min(CANDIDATES, config.vocab_size)

    @jax.jit
    def run(params, tokens_1T):
        inside = look_inside(config, params, tokens_1T)
        own, merged = gpt.for_decoding(config, params)

        def read(stream_1TD):
            return gpt.logits(own, merged, gpt.final_norm(own, merged, stream_1TD))[0]

        def of_layer(stream_1TD):
            probabilities_TV = jax.nn.softmax(read(stream_1TD), axis=-1)
            following_T = jnp.roll(tokens_1T[0], -1)
            return *jax.lax.top_k(probabilities_TV, min(LENS, count)), probabilities_TV[jnp.arange(T), following_T]

        lens = jax.lax.map(of_layer, inside.streams_NBTD)
        logits_TV = read(inside.streams_NBTD[-1])
        log_TV = jax.nn.log_softmax(logits_TV, axis=-1)
        top_logits_TK, top_TK = jax.lax.top_k(logits_TV, count)
        own_T = log_TV[jnp.arange(T - 1), tokens_1T[0, 1:]]
        ranks_T = jnp.sum(log_TV[:-1] > own_T[:, None], axis=-1)
        weights_NHTS = inside.weights_NBHTS[:, 0]
        top_p_TK = jnp.exp(jnp.take_along_axis(log_TV, top_TK, axis=-1))
        return weights_NHTS, own_T, ranks_T, top_TK, top_logits_TK, top_p_TK, lens, _entropies(weights_NHTS)

    weights, own, ranks, top, top_logits, top_p, (lens_p, lens, following), entropies = jax.device_get(
        run(params, jnp.asarray(tokens_T, jnp.int32)[None])
    )
    following = np.array(following)
    following[:, -1] = np.nan
    return Inspection(
        tokens_T=np.asarray(tokens_T),
        weights_NHTS=weights,
        log_probabilities_T=np.concatenate([[np.nan], own]),
        ranks_T=np.concatenate([[-1], ranks]),
        top_tokens_TK=top,
        top_logits_TK=top_logits,
        top_probabilities_TK=top_p,
        lens_tokens_NTK=lens,
        lens_probabilities_NTK=lens_p,
        lens_next_NT=following,
        entropies_NH=entropies,
    )


def layer_statistics(config: ModelConfig, params: dict, tokens_T: np.ndarray) -> dict[str, dict[str, float]]:
    """Measures the layers on one text in float32, by quantity and by layer.

    Returns:
        `residual_rms`: root mean square of the residual stream that the first block reads (`embed`) and that each block
        leaves (`layer_0`, ...). `attention_entropy` and `attention_entropy_min`: mean over positions of the entropy of
        attention in nats, averaged over the heads of a layer, and of its head with the lowest.
    """
    rms_N, entropies_NH = jax.device_get(_layer_statistics(config, params, jnp.asarray(tokens_T, jnp.int32)[None]))
    layers = [f"layer_{layer}" for layer in range(config.n_layer)]
    columns = {
        "residual_rms": (["embed", *layers], rms_N),
        "attention_entropy": (layers, entropies_NH.mean(axis=1)),
        "attention_entropy_min": (layers, entropies_NH.min(axis=1)),
    }
    return {name: dict(zip(rows, values.tolist(), strict=True)) for name, (rows, values) in columns.items()}


@functools.partial(jax.jit, static_argnums=0)
def _layer_statistics(config: ModelConfig, params: dict, tokens_1T: jax.Array) -> tuple[jax.Array, jax.Array]:
    inside = look_inside(config, params, tokens_1T)
    rms_N = jnp.sqrt(jnp.mean(jnp.square(inside.streams_NBTD), axis=(1, 2, 3)))
    return rms_N, _entropies(inside.weights_NBHTS[:, 0])


def _entropies(weights_NHTS: jax.Array) -> jax.Array:
    """Mean entropy of the rows of attention weights, `[N, H]`, in nats."""
    return -jnp.sum(jax.scipy.special.xlogy(weights_NHTS, weights_NHTS), axis=-1).mean(axis=-1)
