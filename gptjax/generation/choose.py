"""How the next token is chosen.

Shape suffixes: B row, V vocabulary, K candidates, N one of the two.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config.verbs import SampleConfig

GROUP = 256


class Rule(NamedTuple):
    """What is compiled into the choice; how hot and how wide it is stays an argument."""

    greedy: bool
    """Take the likeliest token; the other fields mean nothing then."""
    top_k: int
    """Choose among this many likeliest tokens; 0: all."""
    nucleus: bool
    """Choose among the fewest tokens that hold a given probability."""


def choice_rule(options: SampleConfig) -> Rule:
    """Returns the rule that sampling options ask for."""
    if options.temperature == 0:
        return Rule(greedy=True, top_k=0, nucleus=False)
    return Rule(greedy=False, top_k=options.top_k, nucleus=options.top_p < 1)


def choose(logits_BV: jax.Array, keys_B: jax.Array, rule: Rule, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Returns the next token of each row, `[B]`, int32; a row depends on nothing but its own logits and key.

    The logits are divided by the temperature, then cut to the `top_k` likeliest tokens, then to the likeliest of
    these that hold `top_p` of their probability (at least one; tokens as likely as the last one kept stay too).
    Equal logits count in the order of their ids.

    Args:
        logits_BV: Float32.
        keys_B: One random key per row; not used by a greedy rule.
        rule: What is on; `rule.top_k` is at most V.
        temperature: Scalar above 0.
        top_p: Scalar in (0, 1].

    Raises:
        ValueError: `logits_BV` is not float32.

    Source: top-p is nucleus sampling, arXiv:1904.09751, section 3.1.
    """
    if logits_BV.dtype != jnp.float32:
        raise ValueError(f"logits_BV has dtype {logits_BV.dtype}, must be float32")
    if rule.greedy:
        return _likeliest(logits_BV)
    scores = logits_BV / temperature
    if not rule.top_k:
        if rule.nucleus:
            scores = _nucleus(scores, top_p)
        return _draw(scores, keys_B)
    scores_BK, ids_BK = jax.lax.top_k(scores, rule.top_k)
    if rule.nucleus:
        scores_BK = _nucleus(scores_BK, top_p)
    return jnp.take_along_axis(ids_BK, _draw(scores_BK, keys_B)[:, None], axis=1)[:, 0]


def _likeliest(logits_BV: jax.Array) -> jax.Array:
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


def _nucleus(scores: jax.Array, top_p: jax.Array) -> jax.Array:
    """Pushes all but the likeliest scores that hold `top_p` to minus infinity.

    The smallest probability that stays is found by bisection of its bits, which order as non-negative floats do:
    exact after 31 sums, an order of magnitude cheaper than sorting a vocabulary of 50,000.
    """
    probs = jax.nn.softmax(scores, axis=-1)

    def halve(_, bounds):
        low, high = bounds  # what stays from `low` up holds top_p, what stays from `high` up does not
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.sum(probs, axis=-1, keepdims=True, where=probs >= threshold) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The top of the search is the bits just above the likeliest, so that one token always stays.
    largest = jnp.max(probs, axis=-1, keepdims=True)
    high = jax.lax.bitcast_convert_type(largest, jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return jnp.where(probs >= jax.lax.bitcast_convert_type(low, jnp.float32), scores, -jnp.inf)
