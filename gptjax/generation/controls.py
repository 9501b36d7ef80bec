"""How the next token is chosen, and how logits change before that: biases, repetition penalties, banned tokens.

Shape suffixes: B sequence, V vocabulary, L token of a sequence's history, W banned sequence, N token of a banned
sequence except its last.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.generation.choose import Numbers, Rule

BANNED = -1e30
"""Logit of a banned token. It is finite, so that a softmax over only banned tokens is not NaN."""
NO_TOKEN, ANY_TOKEN = -1, -2
ROUND = 256  # histories have a multiple of this length, so that few programs compile


class Tables(NamedTuple):
    """Arrays that stay the same during decoding; None if the rule does not use them."""

    bias_BV: jax.Array | None = None
    """Added to the logits, `[B, V]` or `[1, V]`."""
    before_WN: jax.Array | None = None
    """Banned sequences without their last token, right-aligned; shorter ones are padded with `ANY_TOKEN`."""
    last_W: jax.Array | None = None
    """Their last tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """How the next token of each sequence is chosen; only a constraint changes it during decoding."""

    rule: Rule = dataclasses.field(metadata={"static": True})
    numbers: Numbers
    tables: Tables
    stop_B: np.ndarray | jax.Array
    """Id that ends a sequence; `NO_TOKEN` if there is none."""


class History(NamedTuple):
    """The tokens of each sequence so far; None for parts that the rule does not use."""

    in_prompt_BV: jax.Array | None = None
    """Whether the token occurs in the prompt."""
    counts_BV: jax.Array | None = None
    """How often the token was generated, int32."""
    tokens_BL: jax.Array | None = None
    """Prompt and new tokens, left-aligned."""
    length_B: jax.Array | None = None
    """Number of valid tokens in `tokens_BL`."""


def make_tables(rule: Rule, bias: dict[int, float], words: Sequence[Sequence[int]], vocab_size: int) -> Tables:
    """Makes tables from a bias by token id, the same for every sequence, and banned sequences of token ids."""
    bias_1V = np.zeros((1, vocab_size), np.float32)
    for token, value in bias.items():
        bias_1V[0, token] = value
    before_WN = np.full((len(words), max((len(word) for word in words), default=1) - 1), ANY_TOKEN, np.int32)
    for row, word in zip(before_WN, words, strict=True):
        row[len(row) - len(word) + 1 :] = word[:-1]
    last_W = np.array([word[-1] for word in words], np.int32)
    return Tables(
        jnp.asarray(bias_1V) if rule.bias else None,
        *((jnp.asarray(before_WN), jnp.asarray(last_W)) if rule.words else (None, None)),
    )


def make_history(rule: Rule, prompts: Sequence[np.ndarray], new: int, vocab_size: int) -> History:
    """The history of sequences that consist of their prompts, with room for `new` new tokens."""
    rows, history = len(prompts), History()
    if rule.penalties:
        in_prompt_BV = np.zeros((rows, vocab_size), bool)
        for row, prompt in zip(in_prompt_BV, prompts, strict=True):
            row[prompt] = True
        counts_BV = jnp.zeros((rows, vocab_size), jnp.int32)
        history = history._replace(in_prompt_BV=jnp.asarray(in_prompt_BV), counts_BV=counts_BV)
    if rule.ngram or rule.words:
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens_BL = np.full((rows, -(-(int(lengths_B.max()) + new) // ROUND) * ROUND), NO_TOKEN, np.int32)
        for row, prompt in zip(tokens_BL, prompts, strict=True):
            row[: len(prompt)] = prompt
        history = history._replace(tokens_BL=jnp.asarray(tokens_BL), length_B=jnp.asarray(lengths_B))
    return history


def remember(history: History, next_B: jax.Array, taken_B: jax.Array | bool = True) -> History:
    """Adds one token to each sequence that takes it, and has room for it."""
    rows_B, taken_B = jnp.arange(next_B.shape[0]), jnp.broadcast_to(taken_B, next_B.shape)
    if history.counts_BV is not None:
        history = history._replace(counts_BV=history.counts_BV.at[rows_B, next_B].add(taken_B.astype(jnp.int32)))
    if history.tokens_BL is not None and history.length_B is not None:
        place_B = jnp.where(taken_B, history.length_B, history.tokens_BL.shape[1])
        tokens_BL = history.tokens_BL.at[rows_B, place_B].set(next_B, mode="drop")
        history = history._replace(tokens_BL=tokens_BL, length_B=history.length_B + taken_B)
    return history


def control(logits_BV: jax.Array, controls: Controls, history: History, count: jax.Array) -> jax.Array:
    """Applies the controls of the rule, in this order: bias, repetition, presence and frequency, n-grams, words, end.

    Args:
        logits_BV: The model's logits, float32.
        controls: The repetition penalty divides positive logits of tokens in the history (prompt included) and
            multiplies negative ones. The presence penalty is subtracted once for each token that was generated, the
            frequency penalty once per occurrence.
        history: Tokens so far.
        count: New tokens so far, a scalar or `[B]`.

    Source: repetition penalty: arXiv:1909.05858, section 4.1; presence and frequency penalties: OpenAI's API.
    """
    rule, numbers, tables, V = controls.rule, controls.numbers, controls.tables, logits_BV.shape[1]
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    if tables.bias_BV is not None and rule.bias:
        logits_BV = logits_BV + tables.bias_BV
    if history.counts_BV is not None and history.in_prompt_BV is not None and rule.penalties:
        new_BV, repetition_B1 = history.counts_BV > 0, numbers.repetition[:, None]
        repeated_BV = jnp.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
        logits_BV = jnp.where(new_BV | history.in_prompt_BV, repeated_BV, logits_BV)
        logits_BV = logits_BV - numbers.frequency[:, None] * history.counts_BV.astype(jnp.float32)
        logits_BV = jnp.where(new_BV, logits_BV - numbers.presence[:, None], logits_BV)
    if history.tokens_BL is not None and history.length_B is not None:
        if rule.ngram:
            repeats_BL = _repeats(history.tokens_BL, history.length_B, rule.ngram)
            banned_BL = jnp.where(repeats_BL, history.tokens_BL, V)
            logits_BV = logits_BV.at[rows_B1, banned_BL].set(BANNED, mode="drop")
        if tables.before_WN is not None and tables.last_W is not None and rule.words:
            matches_BW = _matches(history.tokens_BL, history.length_B, tables.before_WN)
            banned_BW = jnp.where(matches_BW, tables.last_W[None], V)
            logits_BV = logits_BV.at[rows_B1, banned_BW].set(BANNED, mode="drop")
    if rule.min_new:
        early_B1 = (count < numbers.min_new)[:, None]
        logits_BV = jnp.where(early_B1 & (jnp.arange(V)[None] == controls.stop_B[:, None]), BANNED, logits_BV)
    return logits_BV


def _repeats(tokens_BL: jax.Array, length_B: jax.Array, n: int) -> jax.Array:
    """Whether a token ends an n-gram whose first n - 1 tokens are the newest n - 1 of the sequence, `[B, L]`."""
    place_1L = jnp.arange(tokens_BL.shape[1])[None]
    repeats_BL = (place_1L >= n - 1) & (place_1L < length_B[:, None])
    for back in range(1, n):
        newest_B1 = jnp.take_along_axis(tokens_BL, jnp.maximum(length_B - back, 0)[:, None], axis=1)
        repeats_BL &= jnp.roll(tokens_BL, back, axis=1) == newest_B1
    return repeats_BL


def _matches(tokens_BL: jax.Array, length_B: jax.Array, before_WN: jax.Array) -> jax.Array:
    """Whether the newest tokens of a sequence match a banned one without its last token, `[B, W]`."""
    N = before_WN.shape[1]
    place_BN = length_B[:, None] - N + jnp.arange(N)[None]
    recent_BN = jnp.where(place_BN >= 0, jnp.take_along_axis(tokens_BL, jnp.maximum(place_BN, 0), axis=1), NO_TOKEN)
    same_BWN = (before_WN[None] == recent_BN[:, None]) | (before_WN[None] == ANY_TOKEN)
    return jnp.all(same_BWN, axis=-1)
