"""How the next token is chosen. Shape suffixes: B row, V vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.choose import Rule, choice_numbers, choice_rule, choose

V = 40
GREEDY = Rule(greedy=True, top_k=0, nucleus=False)
run = jax.jit(choose, static_argnums=2)


def numbers(rows, **changed):
    """Numbers of rows that are all alike."""
    return choice_numbers(SampleConfig(), rows)._replace(
        **{name: jnp.full(rows, value, jnp.float32) for name, value in changed.items()}
    )


@pytest.fixture(scope="module")
def logits_V():
    return np.random.default_rng(0).normal(size=V).astype(np.float32) * 2


def draw(logits_V, rule, temperature=1.0, top_p=1.0, draws=4000, seed=0):
    """Ids drawn from one row of logits with different keys."""
    keys = jax.random.split(jax.random.key(seed), draws)
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V), (draws, len(logits_V)))
    return np.asarray(run(logits_BV, keys, rule, numbers(draws, temperature=temperature, top_p=top_p)))


def allowed(logits_V, temperature=1.0, top_k=0, top_p=1.0):
    """The ids that may be chosen and their probabilities, written with a sort: k first, then p of what is left."""
    order = np.argsort(-logits_V, kind="stable")[: top_k or None]
    probs = np.exp(logits_V[order].astype(np.float64) / temperature)
    probs /= probs.sum()
    count = int(np.searchsorted(np.cumsum(probs), top_p)) + 1
    return dict(zip(order[:count], probs[:count] / probs[:count].sum(), strict=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, V])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
def test_ids_are_drawn_with_the_probabilities_of_a_reference(logits_V, temperature, top_k, top_p):
    expected = allowed(logits_V, temperature, top_k, top_p)
    ids = draw(logits_V, Rule(False, top_k, top_p < 1), temperature, top_p)
    assert set(ids) <= set(expected)
    frequency = np.bincount(ids, minlength=V) / len(ids)
    for token, probability in expected.items():
        deviation = (probability * (1 - probability) / len(ids)) ** 0.5
        assert abs(frequency[token] - probability) <= 5 * deviation + 3 / len(ids)  # one rare draw is no fault


def test_greedy_takes_the_first_of_the_largest(logits_V):
    logits_V = logits_V.copy()
    logits_V[[9, 4, 30]] = 50.0
    assert set(draw(logits_V, GREEDY, draws=3)) == {4}
    assert set(draw(logits_V, Rule(False, 1, False), draws=50)) == {4}


def test_a_tiny_top_p_is_greedy(logits_V):
    assert set(draw(logits_V, Rule(False, 0, True), top_p=1e-6, draws=50)) == {int(np.argmax(logits_V))}


def test_tokens_as_likely_as_the_last_one_kept_stay():
    logits_V = np.zeros(V, np.float32)
    logits_V[:2] = 5.0
    assert set(draw(logits_V, Rule(False, 0, True), top_p=0.1)) == {0, 1}


@pytest.mark.parametrize("rule", [GREEDY, Rule(False, 0, False), Rule(False, 5, True), Rule(False, 0, True)])
def test_a_row_does_not_depend_on_the_others(rule):
    logits_BV = jnp.asarray(np.random.default_rng(1).normal(size=(6, V)), jnp.float32)
    keys_B = jax.random.split(jax.random.key(3), 6)
    together = run(logits_BV, keys_B, rule, numbers(6, temperature=0.8, top_p=0.7))
    one = numbers(1, temperature=0.8, top_p=0.7)
    alone = [run(logits_BV[i : i + 1], keys_B[i : i + 1], rule, one) for i in range(6)]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_a_very_hot_and_a_very_peaked_choice_stay_in_the_vocabulary(logits_V):
    for scale, temperature in ((1.0, 1e9), (1e6, 1e-3), (1e30, 1e-3)):
        ids = draw(logits_V * np.float32(scale), Rule(False, 0, True), temperature, 0.9, draws=200)
        assert ids.min() >= 0
        assert ids.max() < V


def test_new_temperature_and_top_p_do_not_compile_again(logits_V):
    compiled = jax.jit(functools.partial(choose), static_argnums=2)
    keys = jax.random.split(jax.random.key(0), 1)
    for temperature, top_p in ((0.5, 0.9), (1.5, 0.2)):
        compiled(
            jnp.asarray(logits_V)[None], keys, Rule(False, 0, True), numbers(1, temperature=temperature, top_p=top_p)
        )
    assert compiled._cache_size() == 1


def test_options_become_the_cheapest_rule():
    assert choice_rule(SampleConfig(temperature=0)) == GREEDY
    assert choice_rule(SampleConfig()) == Rule(False, 0, False)
    assert choice_rule(SampleConfig(top_k=3, top_p=0.5)) == Rule(False, 3, True)


def test_logits_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        choose(jnp.zeros((1, V), jnp.bfloat16), jax.random.split(jax.random.key(0), 1), GREEDY, numbers(1))


def test_rows_with_numbers_of_their_own_choose_as_rows_alone():
    """One program for rows that are greedy, cut by top-k or not at all; see `Rule.mixed`."""
    logits_BV = jnp.asarray(np.random.default_rng(1).normal(size=(4, V)), jnp.float32)
    keys_B = jax.random.split(jax.random.key(3), 4)
    settings = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6)]
    temperature, top_k, top_p = (jnp.asarray(column) for column in zip(*settings, strict=True))
    mixed = Rule(False, nucleus=True, mixed=True, row_top_k=True)
    for offset in range(20):
        row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, offset)
        own = choice_numbers(SampleConfig(), 4)._replace(temperature=temperature, top_k=top_k, top_p=top_p)
        together = run(logits_BV, row_keys, mixed, own)
        for row, (heat, k, p) in enumerate(settings):
            rule = GREEDY if heat == 0 else Rule(False, nucleus=p < 1, row_top_k=k > 0, mixed=False)
            alone = choice_numbers(SampleConfig(), 1)._replace(
                temperature=jnp.full(1, heat or 1.0), top_k=jnp.full(1, k), top_p=jnp.full(1, p)
            )
            assert together[row] == run(logits_BV[row : row + 1], row_keys[row : row + 1], rule, alone)[0]


def test_a_rows_own_top_k_keeps_the_most_likely(logits_V):
    draws = 400
    own = numbers(draws)._replace(top_k=jnp.full(draws, 3))
    keys = jax.random.split(jax.random.key(0), draws)
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V), (draws, V))
    ids = run(logits_BV, keys, Rule(False, row_top_k=True), own)
    assert set(np.asarray(ids).tolist()) == set(np.argsort(-logits_V)[:3].tolist())
