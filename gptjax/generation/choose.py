"""Chooses the next token from logits: greedy decoding and sampling.

Shape suffixes: B sequence, V vocabulary, K candidates, N either V or K.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.verbs.sample import SampleConfig

GROUP = 256
LARGEST_BITS = np.iinfo(np.int32).max


class Rule(NamedTuple):
    """The static part of sampling options: it decides what is compiled. The dynamic part is `Numbers`."""

    greedy: bool
    """Take the most likely token; the fields up to `mixed` then have no effect."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: all."""
    nucleus: bool = False
    """Sample from the smallest set of tokens whose probabilities sum to `Numbers.top_p`."""
    min_p: bool = False
    """Exclude tokens whose probability is below `Numbers.min_p` times the largest one."""
    typical: bool = False
    """Sample from the most typical tokens whose probabilities sum to `Numbers.typical_p`."""
    mixed: bool = False
    """Sequences of temperature 0 take the most likely token; the others sample."""
    row_top_k: bool = False
    """Each sequence has its own `Numbers.top_k`."""
    bias: bool = False
    """Add `Tables.bias`."""
    penalties: bool = False
    """Apply the penalties of `Numbers` to tokens that occurred."""
    ngram: int = 0
    """Ban tokens that would repeat an n-gram of this length; 0: none."""
    words: bool = False
    """Ban the sequences of `Tables`."""
    min_new: bool = False
    """Ban end-of-text before a sequence has `Numbers.min_new` new tokens."""
    logprobs: int = 0
    """Return log-probabilities of the chosen token and of this many most likely tokens; 0: none."""


class Numbers(NamedTuple):
    """Sampling parameters of each sequence, `[B]`: float32, or int32 for counts."""

    temperature: jax.Array
    """Divides the logits. 0 (allowed only with `Rule.mixed` or `Rule.greedy`): the most likely token."""
    top_k: jax.Array
    """0: all tokens."""
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    min_new: jax.Array


def choice_rule(options: SampleConfig, words: bool = False) -> Rule:
    """Returns the rule of sampling options; `words`: whether there are banned sequences."""
    heated = options.temperature > 0
    return Rule(
        greedy=not heated,
        top_k=options.top_k,
        nucleus=options.top_p < 1,
        min_p=options.min_p > 0,
        typical=options.typical_p < 1,
        bias=bool(options.logit_bias),
        penalties=options.repetition_penalty != 1 or options.presence_penalty != 0 or options.frequency_penalty != 0,
        ngram=options.no_repeat_ngram,
        words=words,
        min_new=options.min_new_tokens > 0,
        logprobs=options.logprobs,
    )


def choice_numbers(options: SampleConfig, rows: int) -> Numbers:
    """Returns the numbers of sampling options, the same for every sequence."""
    numbers = (
        options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
        options.typical_p,
        options.repetition_penalty,
        options.presence_penalty,
        options.frequency_penalty,
        options.min_new_tokens,
    )
    arrays = [np.full(rows, number, np.int32 if isinstance(number, int) else np.float32) for number in numbers]
    return Numbers(*jax.device_put(arrays))


def choose(logits_BV: jax.Array, keys_B: jax.Array, rule: Rule, numbers: Numbers) -> jax.Array:
    """Returns the next token of each sequence, `[B]`, int32. It depends only on that sequence's logits, key and
    numbers.

    The logits are divided by the temperature. Then the filters of the rule remove tokens, in this order: `top_k`,
    `top_p`, `min_p`, `typical_p`. At least one token always remains. Top-p also keeps all tokens that are as likely as
    the last one it keeps; among equal logits, top-k keeps the lowest ids.

    Args:
        logits_BV: Float32.
        keys_B: One random key per sequence; a greedy rule does not use them.
        rule: `rule.top_k` is at most V.
        numbers: Parameters of each sequence.

    Raises:
        ValueError: `logits_BV` is not float32.

    Source: top-p is nucleus sampling, arXiv:1904.09751, section 3.1; min-p is arXiv:2407.01082, section 3; typical
    sampling is arXiv:2202.00666, section 4.
    """
    if logits_BV.dtype != jnp.float32:
        raise ValueError(f"logits_BV has dtype {logits_BV.dtype}, must be float32")
    if rule.greedy:
        return _most_likely(logits_BV)
    temperature_B1 = numbers.temperature[:, None]
    if rule.mixed:
        temperature_B1 = jnp.where(temperature_B1 > 0, temperature_B1, 1.0)
    scores_BN, ids_BN = logits_BV / temperature_B1, None
    if rule.top_k:
        scores_BN, ids_BN = jax.lax.top_k(scores_BN, rule.top_k)
    next_B = _draw(_filtered(scores_BN, rule, numbers), keys_B)
    if ids_BN is not None:
        next_B = jnp.take_along_axis(ids_BN, next_B[:, None], axis=1)[:, 0]
    return jnp.where(numbers.temperature > 0, next_B, _most_likely(logits_BV)) if rule.mixed else next_B


def probabilities(logits_BV: jax.Array, rule: Rule, numbers: Numbers) -> jax.Array:
    """The distribution from which `choose` draws, `[B, V]`; one of a greedy rule has a single token.

    A rule with `top_k` keeps all tokens as likely as the last one that stays.
    """
    if rule.greedy:
        return jax.nn.one_hot(_most_likely(logits_BV), logits_BV.shape[1])
    rule = rule._replace(row_top_k=rule.row_top_k or rule.top_k > 0)
    return jax.nn.softmax(_filtered(logits_BV / numbers.temperature[:, None], rule, numbers), axis=-1)


def draw(probs_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draws a token of each row, `[B]`, int32, from probabilities that need not sum to 1."""
    return _draw(jnp.log(probs_BV), keys_B)


def _filtered(scores_BN: jax.Array, rule: Rule, numbers: Numbers) -> jax.Array:
    """Scores in which excluded tokens are minus infinity."""
    if rule.row_top_k:
        count_B1 = jnp.where(numbers.top_k > 0, numbers.top_k, scores_BN.shape[1])[:, None].astype(jnp.float32)
        scores_BN = _keep(scores_BN, _order(jax.nn.softmax(scores_BN, axis=-1)), jnp.ones_like(scores_BN), count_B1)
    if rule.nucleus:
        probs_BN = jax.nn.softmax(scores_BN, axis=-1)
        scores_BN = _keep(scores_BN, _order(probs_BN), probs_BN, _mass(numbers.top_p))
    if rule.min_p:
        largest_B1 = jnp.max(scores_BN, axis=-1, keepdims=True)
        scores_BN = jnp.where(scores_BN >= largest_B1 + jnp.log(numbers.min_p)[:, None], scores_BN, -jnp.inf)
    if rule.typical:
        log_p_BN = jax.nn.log_softmax(scores_BN, axis=-1)
        probs_BN = jnp.exp(log_p_BN)
        entropy_B1 = -jnp.sum(jnp.where(probs_BN > 0, probs_BN * log_p_BN, 0.0), axis=-1, keepdims=True)
        typical_BN = LARGEST_BITS - _order(jnp.abs(-log_p_BN - entropy_B1))
        scores_BN = _keep(scores_BN, typical_BN, probs_BN, _mass(numbers.typical_p))
    return scores_BN


def log_probabilities(logits_BV: jax.Array, chosen_B: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the chosen tokens, `[B]`, and the `count` most likely tokens with theirs, `[B, count]`."""
    log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    top_BK, ids_BK = jax.lax.top_k(log_p_BV, count)
    return jnp.take_along_axis(log_p_BV, chosen_B[:, None], axis=1)[:, 0], ids_BK, top_BK


def _most_likely(logits_BV: jax.Array) -> jax.Array:
    """The first index of the largest logit, `[B]`, int32.

    First finds the group with the largest logit, then the index within that group: a maximum over many numbers is
    several times as fast as an argmax.
    """
    group_B = jnp.argmax(jnp.max(_groups(logits_BV, -jnp.inf), axis=-1), axis=-1)
    # The last group is padded by repeating the last index; argmax returns the first of equal values.
    indices_BN = jnp.minimum(group_B[:, None] * GROUP + jnp.arange(GROUP)[None], logits_BV.shape[1] - 1)
    members = jnp.take_along_axis(logits_BV, indices_BN, axis=1)
    return (group_B * GROUP + jnp.argmax(members, axis=-1)).astype(jnp.int32)


def _draw(scores_BN: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draws an index of each row with probabilities `softmax(scores_BN)`, `[B]`, int32.

    First draws a group of indices, then one index of that group. This needs two random numbers per token instead of
    one per vocabulary entry, which would take a fifth of the time of a token.
    """
    weights_BN = jnp.exp(scores_BN - jnp.max(scores_BN, axis=-1, keepdims=True))
    weights = _groups(weights_BN, 0.0)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    group_B = _pick(jnp.sum(weights, axis=-1), uniforms[:, 0])
    members = jnp.take_along_axis(weights, group_B[:, None, None], axis=1)[:, 0]
    return group_B * GROUP + _pick(members, uniforms[:, 1])


def _groups(x_BN: jax.Array, filler: float) -> jax.Array:
    """Reshapes to `[B, groups, GROUP]`; the end is padded with `filler`."""
    B, N = x_BN.shape
    return jnp.pad(x_BN, ((0, 0), (0, -N % GROUP)), constant_values=filler).reshape(B, -1, GROUP)


def _pick(weights: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index at which the cumulative sum of the weights exceeds `uniform_B` times their total. Its weight is
    never zero.
    """
    sums = jnp.cumsum(weights, axis=-1)
    return jnp.sum(sums <= uniform_B[:, None] * sums[:, -1:], axis=-1).astype(jnp.int32)


def _order(values: jax.Array) -> jax.Array:
    """The bits of non-negative floats as int32; they have the same order as the floats."""
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def _mass(share_B: jax.Array) -> jax.Array:
    """The probability mass to keep, `[B, 1]`. A share of 1 becomes more than 1, so that rounding never drops a
    token.
    """
    return jnp.where(share_B < 1, share_B, 2.0)[:, None]


def _keep(scores_BN: jax.Array, order_BN: jax.Array, weights_BN: jax.Array, target_B1: jax.Array) -> jax.Array:
    """Keeps the tokens of largest `order_BN` (non-negative) whose weights sum to the target; sets other scores to minus
    infinity.

    Bisection finds the smallest order that is kept: 31 sums give the exact result, ten times faster than sorting a
    vocabulary of 50,000.
    """

    def halve(_, bounds):
        low, high = bounds  # tokens of order >= low reach the target weight, those of order >= high do not
        middle = low + (high - low) // 2
        enough = jnp.sum(weights_BN, axis=-1, keepdims=True, where=order_BN >= middle) >= target_B1
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The upper bound is just above the largest order, so at least one token is kept.
    high = jnp.minimum(jnp.max(order_BN, axis=-1, keepdims=True), LARGEST_BITS - 1) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return jnp.where(order_BN >= low, scores_BN, -jnp.inf)
