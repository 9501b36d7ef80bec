"""Contrastive search: avoids repetition by the hidden states of candidate tokens, and draws nothing.

Each step scores the `top_k` most likely tokens v and takes the one with the largest

    (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

with h_v the final hidden state of the model after it has read v, and h_j those of all earlier tokens, the prompt
included.

Shape suffixes: P prompt, K candidate of a prompt, B = P * K candidates of all prompts, T position, S slot of the cache,
D n_embd, V vocabulary.

Source: arXiv:2202.06417, equation 5.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.choose import log_probabilities
from gptjax.generation.controls import Controls, History, control, make_history, remember
from gptjax.generation.decode import (
    NOTHING,
    PREFILL,
    SLOTS_MULTIPLE,
    DecodingModel,
    Logprobs,
    Piece,
    padded_length,
    prepare,
    round_up,
    split_rows,
)
from gptjax.generation.request import Request, check_prompts, check_room
from gptjax.model.cache import Cache, init_cache, select_rows
from gptjax.model.gpt import extend, finish_logits
from gptjax.ops.projection import project


class _Context(NamedTuple):
    """What the model has read of each prompt and its continuation."""

    cache: Cache
    """K equal sequences for each prompt; a step adds a candidate to each."""
    logits_PV: jax.Array
    """Logits of the next token."""
    states_PSD: jax.Array
    """Hidden states of the tokens in the cache, with length 1."""


def contrastive_search(
    config: ModelConfig, params: dict, request: Request, *, prefix: bool = False
) -> Iterator[list[Piece]]:
    """Yields one token of each prompt at a time; arguments are those of `decode.stream`.

    Biases, penalties and bans change the logits before the candidates are chosen, so they also change p.

    Raises:
        UserError: As `decode.stream`, or a prompt and its new tokens do not fit in the context.
    """
    prompts, options = request.prompts, request.options
    check_prompts(config, prompts, options)
    check_room(config, prompts, options, "contrastive_alpha", reads_last=True)
    return _search(prepare(config, params, options, len(prompts) * options.top_k, prefix), request)


def _search(model: DecodingModel, request: Request) -> Iterator[list[Piece]]:
    prompts, options = request.prompts, request.options
    rows, vocab_size = len(prompts), model.config.vocab_size
    context = _read(model, [np.asarray(prompt, np.int32) for prompt in prompts], options)
    controls = request.controls(vocab_size, rows)
    history = make_history(controls.rule, prompts, options.max_new_tokens, vocab_size)
    done_P = np.zeros(rows, bool)
    for number in range(options.max_new_tokens):
        numbers = np.float32(options.contrastive_alpha), np.int32(number)
        context, history, next_P, logprobs = _step(model, controls, options.top_k, context, history, *numbers)
        done_P |= np.asarray(next_P) == request.stop
        yield split_rows(np.where(done_P, NOTHING, next_P)[:, None], jax.device_get(logprobs))
        done_P |= [request.is_finished(row) for row in range(rows)]
        if done_P.all():
            return


def _read(model: DecodingModel, prompts: list[np.ndarray], options: SampleConfig) -> _Context:
    """Reads prompts, which are padded on the left."""
    length, K = padded_length(max(map(len, prompts))), options.top_k
    slots = round_up(length + options.max_new_tokens, SLOTS_MULTIPLE)
    padding_P = np.array([length - len(prompt) for prompt in prompts], np.int32)
    tokens_PT = np.stack([np.pad(prompt, (length - len(prompt), 0)) for prompt in prompts])
    cache = init_cache(model.config, jnp.asarray(padding_P), slots, model.stored)
    parts, chunk = [], length if model.prefix else PREFILL
    for start in range(0, length, chunk):
        x_PTD, cache = _extend(model, tokens_PT[:, start : start + chunk], cache)
        parts.append(x_PTD)
    logits_PV = _logits(model, parts[-1][:, -1])
    states_PSD = _unit(jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (0, slots - length), (0, 0))))
    return _Context(select_rows(cache, np.repeat(np.arange(len(prompts)), K)), logits_PV, states_PSD)


@functools.partial(jax.jit, donate_argnames="cache")
def _extend(model: DecodingModel, tokens_PT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    return extend(model.config, model.weights.params, tokens_PT, cache, model.dtype, model.prefix)


@jax.jit
def _logits(model: DecodingModel, x_PD: jax.Array) -> jax.Array:
    return finish_logits(model.config, model.weights.params, project(x_PD, model.weights.readout))


@functools.partial(jax.jit, static_argnames="K", donate_argnames=("context", "history"))
def _step(
    model: DecodingModel,
    controls: Controls,
    K: int,
    context: _Context,
    history: History,
    alpha: jax.Array,
    number: jax.Array,
) -> tuple[_Context, History, jax.Array, Logprobs | None]:
    """Chooses and reads one token of each prompt; `number` is the number of new tokens before it.

    Returns:
        The extended context and history; the tokens, `[P]`; and their log-probabilities, `[P, 1]`.
    """
    cache, logits_PV, states_PSD = context
    P, S, D = states_PSD.shape
    slot, first_PK = cache.used, cache.padding_B.reshape(P, K)[:, :1]
    controlled_PV = control(logits_PV, controls, history, number)
    probs_PK, tokens_PK = jax.lax.top_k(jax.nn.softmax(controlled_PV), K)
    x_B1D, cache = extend(model.config, model.weights.params, tokens_PK.reshape(P * K, 1), cache, model.dtype)
    x_PKD = x_B1D.reshape(P, K, D)
    is_token_PS = (jnp.arange(S)[None] >= first_PK) & (jnp.arange(S)[None] < slot)
    cosines_PKS = jnp.einsum("pkd,psd->pks", _unit(x_PKD), states_PSD, precision="highest")
    closest_PK = jnp.max(cosines_PKS, axis=-1, where=is_token_PS[:, None], initial=-1.0)
    scores_PK = (1 - alpha) * probs_PK - alpha * closest_PK
    best_P = jnp.argmax(jnp.where(probs_PK > 0, scores_PK, -jnp.inf), axis=-1)  # banned tokens have probability 0
    next_P = jnp.take_along_axis(tokens_PK, best_P[:, None], axis=1)[:, 0]
    x_PD = jnp.take_along_axis(x_PKD, best_P[:, None, None], axis=1)[:, 0]
    logprobs = None
    if count := controls.rule.logprobs:
        logprobs = Logprobs(*(part[:, None] for part in log_probabilities(logits_PV, next_P, count)))
    cache = select_rows(cache, jnp.repeat(jnp.arange(P) * K + best_P, K, total_repeat_length=P * K))
    states_PSD = jax.lax.dynamic_update_slice(states_PSD, _unit(x_PD)[:, None], (0, slot, 0))
    logits_PV = _logits(model, x_PD)
    return _Context(cache, logits_PV, states_PSD), remember(history, next_P), next_P, logprobs


def _unit(x: jax.Array) -> jax.Array:
    """Vectors along the last axis divided by their length, float32; zeros stay zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny))
