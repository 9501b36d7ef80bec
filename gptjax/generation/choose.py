"""How the next token is chosen from logits.

Shape suffixes: B row, V vocabulary, K candidates, N one of the two.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.verbs.sample import SampleConfig

GROUP = 256
LARGEST_BITS = np.iinfo(np.int32).max


class Rule(NamedTuple):
    """What is compiled into the choice; the numbers that belong to it are arguments (`Numbers`)."""

    greedy: bool
    """Take the most likely token; the fields up to `mixed` mean nothing then."""
    top_k: int = 0
    """Choose among this many most likely tokens; 0: all."""
    nucleus: bool = False
    """Choose among the fewest tokens whose probabilities sum to `Numbers.top_p`."""
    min_p: bool = False
    """Leave out tokens whose probability is below `Numbers.min_p` times the largest one."""
    typical: bool = False
    """Choose among the most typical tokens whose probabilities sum to `Numbers.typical_p`."""
    mixed: bool = False
    """A row of temperature 0 takes its most likely token; other rows draw."""
    row_top_k: bool = False
    """Each row has its own `Numbers.top_k`."""
    bias: bool = False
    """Add `Tables.bias`."""
    penalties: bool = False
    """Apply the penalties of `Numbers` to tokens that occurred."""
    ngram: int = 0
    """Ban tokens that would repeat an n-gram of this length; 0: none."""
    words: bool = False
    """Ban the sequences of `Tables`."""
    min_new: bool = False
    """Ban end-of-text before a row has `Numbers.min_new` new tokens."""
    logprobs: int = 0
    """Return log-probabilities of the chosen and of this many most likely tokens; 0: none."""


class Numbers(NamedTuple):
    """Numbers of each row, `[B]`: float32, or int32 where they count."""

    temperature: jax.Array
    """Divides the logits; 0, only with `Rule.mixed` or `Rule.greedy`: the most likely token."""
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
    """Returns the rule that sampling options ask for; `words`: whether there are sequences to ban."""
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
    """Returns the numbers of sampling options, the same for every row."""
    return Numbers(
        *(
            jnp.full(rows, number, jnp.int32 if isinstance(number, int) else jnp.float32)
            for number in (
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
        )
    )


def choose(logits_BV: jax.Array, keys_B: jax.Array, rule: Rule, numbers: Numbers) -> jax.Array:
    """Returns the next token of each row, `[B]`, int32; a row depends on nothing but its own logits, key and numbers.

    The logits are divided by the temperature. Then each filter of the rule removes tokens from those that the one
    before it left, in this order: `top_k`, `top_p`, `min_p`, `typical_p`. At least one token always stays. Tokens as
    likely as the last one that top-p keeps stay too; of equal logits, top-k keeps those with the lowest ids.

    Args:
        logits_BV: Float32.
        keys_B: One random key per row; not used by a greedy rule.
        rule: What is on; `rule.top_k` is at most V.
        numbers: Of each row.

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


def _filtered(scores_BN: jax.Array, rule: Rule, numbers: Numbers) -> jax.Array:
    """Scores with minus infinity for what may not be chosen."""
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

    First the group, then which of it: the largest of many is found several times as fast as its index.
    """
    group_B = jnp.argmax(jnp.max(_groups(logits_BV, -jnp.inf), axis=-1), axis=-1)
    # What a last group lacks repeats its last index, which comes first.
    indices_BN = jnp.minimum(group_B[:, None] * GROUP + jnp.arange(GROUP)[None], logits_BV.shape[1] - 1)
    members = jnp.take_along_axis(logits_BV, indices_BN, axis=1)
    return (group_B * GROUP + jnp.argmax(members, axis=-1)).astype(jnp.int32)


def _draw(scores_BN: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draws an index of each row with probabilities `softmax(scores_BN)`, `[B]`, int32.

    First a group of indices is drawn, then one of the group: two random numbers for a token instead of one for each
    word of the vocabulary, which took a fifth of the time of a token.
    """
    weights_BN = jnp.exp(scores_BN - jnp.max(scores_BN, axis=-1, keepdims=True))
    weights = _groups(weights_BN, 0.0)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    group_B = _pick(jnp.sum(weights, axis=-1), uniforms[:, 0])
    members = jnp.take_along_axis(weights, group_B[:, None, None], axis=1)[:, 0]
    return group_B * GROUP + _pick(members, uniforms[:, 1])


def _groups(x_BN: jax.Array, filler: float) -> jax.Array:
    """`[B, groups, GROUP]`, filled up at the end."""
    B, N = x_BN.shape
    return jnp.pad(x_BN, ((0, 0), (0, -N % GROUP)), constant_values=filler).reshape(B, -1, GROUP)


def _pick(weights: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The index at which the running sum of a row passes that share of its total; never one of weight zero."""
    sums = jnp.cumsum(weights, axis=-1)
    return jnp.sum(sums <= uniform_B[:, None] * sums[:, -1:], axis=-1).astype(jnp.int32)


def _order(values: jax.Array) -> jax.Array:
    """The bits of non-negative floats as int32, which order as the floats do."""
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def _mass(share_B: jax.Array) -> jax.Array:
    """The probability to keep, `[B, 1]`; more than there is where all is kept, whatever the sum rounds to."""
    return jnp.where(share_B < 1, share_B, 2.0)[:, None]


def _keep(scores_BN: jax.Array, order_BN: jax.Array, weights_BN: jax.Array, target_B1: jax.Array) -> jax.Array:
    """Sets scores to minus infinity except the first in order (largest `order_BN`, non-negative) that weigh the target.

    The smallest order that stays is found by bisection: exact after 31 sums, an order of magnitude cheaper than sorting
    a vocabulary of 50,000.
    """

    def halve(_, bounds):
        low, high = bounds  # what stays from `low` up weighs the target, what stays from `high` up does not
        middle = low + (high - low) // 2
        enough = jnp.sum(weights_BN, axis=-1, keepdims=True, where=order_BN >= middle) >= target_B1
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The top of the search is just above the first in order, so that one token always stays.
    high = jnp.minimum(jnp.max(order_BN, axis=-1, keepdims=True), LARGEST_BITS - 1) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return jnp.where(order_BN >= low, scores_BN, -jnp.inf)
