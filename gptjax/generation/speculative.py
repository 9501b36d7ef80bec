"""Speculative decoding: a draft proposes several tokens, and the model checks them all in one pass.

The draft is a smaller model, or n-gram lookup: the tokens that followed an earlier occurrence of the newest ones.
Rejection sampling keeps the distribution of the model: token x of a draft's distribution q is accepted with probability
min(1, p(x) / q(x)); the first one that is rejected is replaced by a draw from max(0, p - q). A greedy p has a single
token, so greedy decoding writes what it writes without a draft.

Shape suffixes: B row, K proposed token, T = K + 1 checked position, V vocabulary.

Source: arXiv:2211.17192, section 2.3 and appendix A.1; n-gram lookup as in transformers' prompt_lookup_num_tokens.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.choose import draw, log_probabilities, probabilities
from gptjax.generation.controls import Controls, History, control, make_history, remember
from gptjax.generation.decode import (
    NOTHING,
    SLOTS_MULTIPLE,
    DecodingModel,
    Logprobs,
    Piece,
    extended_logits,
    next_logits,
    prefill_length,
    prefilled,
    round_up,
    split_rows,
)
from gptjax.generation.request import Request, check_prompts
from gptjax.model.cache import Cache

PROPOSE, ACCEPT, REPLACE = range(3)
"""What a random number of a token is for."""


def speculate(model: DecodingModel, draft: DecodingModel | None, request: Request) -> Iterator[list[Piece]]:
    """Yields new tokens as `decode.stream` does, with the same distribution; greedy decoding yields the same tokens.

    The model and the draft are laid out to decode the rows of the request. Without a draft, n-grams of
    `options.draft_ngram` tokens are looked up. At the end `request.notify` gets the share of proposed tokens that were
    accepted.

    Raises:
        UserError: As `decode.stream`, or a prompt, its new tokens and those of the draft do not fit in both contexts.
    """
    check_prompts(model.config, request.prompts, request.options)
    _check_room(shared_block_size(model, draft), request.prompts, request.options)
    return _speculate(model, draft, request)


def shared_block_size(model: DecodingModel, draft: DecodingModel | None) -> int:
    """Number of tokens that fit in the contexts of both models."""
    return min(one.config.block_size for one in (model, draft) if one is not None)


def _check_room(block_size: int, prompts: Sequence[np.ndarray], options: SampleConfig) -> None:
    new = options.max_new_tokens + options.draft_tokens
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) + new > block_size:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, and max_new_tokens={options.max_new_tokens} and"
                f" draft_tokens={options.draft_tokens} more do not fit in model.block_size={block_size}; ask for fewer"
            )


def _speculate(model: DecodingModel, draft: DecodingModel | None, request: Request):
    options = request.options
    contexts = [np.asarray(prompt, np.int32) for prompt in request.prompts for _ in range(options.num_samples)]
    rows, K = len(contexts), options.draft_tokens
    slots = round_up(prefill_length(contexts) + options.max_new_tokens + K + 1, SLOTS_MULTIPLE)
    cache = prefilled(model, contexts, slots, own_lengths=True)
    draft_cache = None if draft is None else prefilled(draft, contexts, slots, own_lengths=True)
    keys_B, controls = request.keys(), request.controls(model.config.vocab_size, rows)
    history = make_history(controls.rule, contexts, options.max_new_tokens + K, model.config.vocab_size)
    lengths_B = np.array([len(c) for c in contexts])
    done_B, count_B, accepted, proposed = np.zeros(rows, bool), np.zeros(rows, np.int32), 0, 0
    while not done_B.all():
        last_B, probs_KBV = np.array([c[-1] for c in contexts], np.int32), None
        if draft is not None and draft_cache is not None:
            draft_cache = draft_cache._replace(used=jnp.array(cache.used))
            draft_cache, drafted_BK, probs_KBV = _propose(draft, controls, K, draft_cache, last_B, keys_B, count_B)
        else:
            drafted_BK = look_up(contexts, options.draft_ngram, K)
            if np.all(drafted_BK[~done_B] == NOTHING):
                drafted_BK = drafted_BK[:, :0]
        cache, history, new_BT, ended_B, accepted_B, logprobs = _check(
            model, controls, cache, history, last_B, drafted_BK, probs_KBV, done_B, keys_B, count_B
        )
        proposed += int(np.sum(np.asarray(drafted_BK)[~done_B] != NOTHING))
        accepted += int(np.sum(accepted_B))
        pieces = split_rows(np.asarray(new_BT), jax.device_get(logprobs))
        left_B = options.max_new_tokens - count_B
        pieces = [_first(piece, left) for piece, left in zip(pieces, left_B.tolist(), strict=True)]
        contexts = [np.concatenate([c, piece.tokens_N]) for c, piece in zip(contexts, pieces, strict=True)]
        count_B = np.array([len(c) for c in contexts], np.int32) - lengths_B.astype(np.int32)
        done_B |= np.asarray(ended_B) | (count_B >= options.max_new_tokens)
        yield pieces
        done_B |= [request.is_finished(row) for row in range(rows)]
    share = f" ({accepted / proposed:.1%})" if proposed else ""
    request.notify(f"draft: {accepted:,} of {proposed:,} proposed tokens were accepted{share}")


def _first(piece: Piece, count: int) -> Piece:
    """The first tokens of a piece."""
    logprobs = None if piece.logprobs is None else Logprobs(*(part[:count] for part in piece.logprobs))
    return Piece(piece.tokens_N[:count], logprobs)


def look_up(contexts: Sequence[np.ndarray], n: int, count: int) -> np.ndarray:
    """Returns the tokens that followed the last earlier occurrence of each context's newest n, int32 `[B, count]`.

    If the newest n tokens do not occur earlier, the newest n - 1 are looked up, and so on. Places past the end of the
    context are `NOTHING`, and so is the whole row if even the newest token is new.
    """
    found_BK = np.full((len(contexts), count), NOTHING, np.int32)
    for found_K, context_L in zip(found_BK, contexts, strict=True):
        for length in range(min(n, len(context_L) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(context_L[:-1], length)
            matches = np.flatnonzero((windows == context_L[-length:]).all(axis=1))
            if len(matches):
                after = context_L[matches[-1] + length :][:count]
                found_K[: len(after)] = after
                break
    return found_BK


def _keys(keys_B: jax.Array, count_B: jax.Array, purpose: int) -> jax.Array:
    return jax.vmap(lambda key, count: jax.random.fold_in(jax.random.fold_in(key, count), purpose))(keys_B, count_B)


@functools.partial(jax.jit, static_argnames="K", donate_argnames="cache")
def _propose(
    draft: DecodingModel,
    controls: Controls,
    K: int,
    cache: Cache,
    last_B: jax.Array,
    keys_B: jax.Array,
    count_B: jax.Array,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Returns K tokens of a draft that follow `last_B`, `[B, K]`, and their distributions, `[K, B, V]`.

    The draft also reads the last of them, so that it is in the cache if it is accepted.
    """

    def step(carry, n):
        cache, last_B = carry
        logits_BV, cache = next_logits(draft, last_B, cache)
        probs_BV = probabilities(logits_BV, controls.rule, controls.numbers)
        next_B = draw(probs_BV, _keys(keys_B, count_B + n, PROPOSE))
        return (cache, next_B), (next_B, probs_BV)

    (cache, _), (drafted, probs) = jax.lax.scan(step, (cache, last_B), jnp.arange(K + 1))
    return cache, drafted[:K].T, probs[:K]


@functools.partial(jax.jit, donate_argnames=("cache", "history"))
def _check(
    model: DecodingModel,
    controls: Controls,
    cache: Cache,
    history: History,
    last_B: jax.Array,
    drafted_BK: jax.Array,
    probs_KBV: jax.Array | None,
    done_B: jax.Array,
    keys_B: jax.Array,
    count_B: jax.Array,
) -> tuple[Cache, History, jax.Array, jax.Array, jax.Array, Logprobs | None]:
    """Accepts proposed tokens, and adds one of the model's own to each row that is not done.

    Arguments are those of `decode.decode`, and the proposed tokens, `NOTHING` where there is none, with the
    distributions that they were drawn from, or None if each was proposed with probability 1.

    Returns:
        The longer cache and history; the new tokens, `[B, T]`; which rows ended; how many proposed tokens were
        accepted; and log-probabilities of the new tokens.
    """
    (B, K), V, used_B, rule = drafted_BK.shape, model.config.vocab_size, cache.used, controls.rule
    tokens_BT = jnp.concatenate([last_B[:, None], jnp.maximum(drafted_BK, 0)], axis=1)
    logits_BTV, cache = extended_logits(model, tokens_BT, cache)
    drafted_TB = jnp.concatenate([drafted_BK.T, jnp.full((1, B), NOTHING)])
    if probs_KBV is None:
        probs_TBV = jax.nn.one_hot(drafted_TB, V)
    else:
        probs_TBV = jnp.concatenate([probs_KBV, jnp.zeros((1, B, V))])

    def step(carry, position):
        history, open_B = carry
        n, logits_BV, q_BV, drafted_B = position
        p_BV = probabilities(control(logits_BV, controls, history, count_B + n), rule, controls.numbers)
        place_B1 = jnp.maximum(drafted_B, 0)[:, None]
        p_B, q_B = (jnp.take_along_axis(x, place_B1, axis=1)[:, 0] for x in (p_BV, q_BV))
        uniform_B = jax.vmap(jax.random.uniform)(_keys(keys_B, count_B + n, ACCEPT))
        accepted_B = (drafted_B != NOTHING) & (uniform_B * q_B < p_B)
        rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
        # If p and q are equal, rounding may leave nothing of the difference.
        rest_BV = jnp.where(jnp.sum(rest_BV, axis=-1, keepdims=True) > 0, rest_BV, p_BV)
        next_B = jnp.where(accepted_B, drafted_B, draw(rest_BV, _keys(keys_B, count_B + n, REPLACE)))
        ended_B = next_B == controls.stop_B
        new_B = jnp.where(open_B & ~ended_B, next_B, NOTHING)
        history = remember(history, next_B, open_B)
        return (history, open_B & accepted_B & ~ended_B), (new_B, open_B & ended_B, open_B & accepted_B, next_B)

    places_T, logits_TBV = jnp.arange(K + 1), logits_BTV.transpose(1, 0, 2)
    (history, _), (new_TB, ended_TB, accepted_TB, next_TB) = jax.lax.scan(
        step, (history, ~done_B), (places_T, logits_TBV, probs_TBV, drafted_TB)
    )
    logprobs = None
    if rule.logprobs:
        found = log_probabilities(logits_TBV.reshape(-1, V), next_TB.reshape(-1), rule.logprobs)
        logprobs = Logprobs(*(x.reshape(K + 1, B, *x.shape[1:]).swapaxes(0, 1) for x in found))
    cache = cache._replace(used=used_B + jnp.sum(new_TB != NOTHING, axis=0))
    return cache, history, new_TB.T, jnp.any(ended_TB, axis=0), jnp.sum(accepted_TB, axis=0), logprobs
