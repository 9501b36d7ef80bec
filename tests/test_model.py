import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.model import cache as kv
from gptjax.model.gpt import Compute, logits, unembedding
from tests.tiny import MODEL, extend, hidden_states, init_params, layer_by_layer

VARIANTS = {
    "gpt2": MODEL,
    "grouped": dataclasses.replace(MODEL, n_head=4, n_kv_head=2),
    "no_bias": dataclasses.replace(MODEL, bias=False),
    "untied": dataclasses.replace(MODEL, tied_embeddings=False),
    "window": dataclasses.replace(MODEL, attention_window=4),
    "padded": dataclasses.replace(MODEL, vocab_size=61, vocab_multiple=16),
}


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def forward(config: ModelConfig, params, tokens_BT, segments_BT=None, positions_BT=None, compute=Compute(unroll=1)):  # noqa: B008
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    x = hidden_states(config, params, tokens_BT, positions_BT, segments_BT, compute=compute)
    return logits(config, params, x)


def tokens(config: ModelConfig, seed: int = 1, B: int = 2, T: int = 16):
    return jax.random.randint(jax.random.key(seed), (B, T), 0, config.vocab_size)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("t", [0, 7, 14])
def test_logits_do_not_depend_on_later_tokens(name, t):
    config = VARIANTS[name]
    params = init_params(config, jax.random.key(0))
    before_BT = tokens(config)
    after_BT = before_BT.at[:, t + 1].set((before_BT[:, t + 1] + 1) % config.vocab_size)
    before, after = (np.asarray(forward(config, params, x)) for x in (before_BT, after_BT))
    np.testing.assert_array_equal(before[:, : t + 1], after[:, : t + 1])
    assert not np.array_equal(before[:, t + 1 :], after[:, t + 1 :])


def test_a_packed_document_is_computed_as_if_it_were_alone():
    params = init_params(MODEL, jax.random.key(0))
    first_BT, second_BT = tokens(MODEL, 1, T=6), tokens(MODEL, 2, T=10)
    packed_BT = jnp.concatenate([first_BT, second_BT], axis=1)
    segments_BT = jnp.broadcast_to(jnp.arange(16)[None] >= 6, (2, 16)).astype(jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.concatenate([jnp.arange(6), jnp.arange(10)])[None], (2, 16))
    packed = forward(MODEL, params, packed_BT, segments_BT, positions_BT)
    np.testing.assert_allclose(packed[:, :6], forward(MODEL, params, first_BT), atol=1e-6)
    np.testing.assert_allclose(packed[:, 6:], forward(MODEL, params, second_BT), atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_steps_equal_one_forward_pass(name):
    config = VARIANTS[name]
    params = init_params(config, jax.random.key(0))
    tokens_BT = tokens(config)
    layers = layer_by_layer(config, params)
    cache = kv.init_cache(config, jnp.zeros(2, jnp.int32), 16, jnp.float32)
    parts = []
    for start, stop in ((0, 9), (9, 10), (10, 16)):
        x, cache = extend(config, layers, tokens_BT[:, start:stop], cache, "float32")
        parts.append(logits(config, params, x))
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), forward(config, params, tokens_BT), atol=1e-5)


def test_left_padding_changes_nothing():
    params = init_params(MODEL, jax.random.key(0))
    tokens_BT = tokens(MODEL, T=10)
    padded_BT = jnp.pad(tokens_BT, ((0, 0), (5, 0)))
    cache = kv.init_cache(MODEL, jnp.full(2, 5, jnp.int32), 15, jnp.float32)
    x, _ = extend(MODEL, layer_by_layer(MODEL, params), padded_BT, cache, "float32")
    np.testing.assert_allclose(logits(MODEL, params, x)[:, 5:], forward(MODEL, params, tokens_BT), atol=1e-5)


def test_initial_loss_is_that_of_guessing():
    params = init_params(MODEL, jax.random.key(0))
    log_probabilities = jax.nn.log_softmax(forward(MODEL, params, tokens(MODEL, B=8)))
    assert float(-jnp.mean(log_probabilities)) == pytest.approx(np.log(MODEL.vocab_size), abs=0.05)


def test_initialisation_is_that_of_gpt2():
    config = ModelConfig(vocab_size=500, block_size=100, n_layer=8, n_head=4, n_embd=64)
    params = init_params(config, jax.random.key(0))
    residual = 0.02 / (2 * 8) ** 0.5
    expected = {"w_qkv": 0.02, "w_in": 0.02, "tokens": 0.02, "positions": 0.02, "w_out": residual}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name == "scale":
            np.testing.assert_array_equal(leaf, 1.0)
        elif name in expected:
            assert float(jnp.std(leaf)) == pytest.approx(expected[name], rel=0.05), path
        else:
            np.testing.assert_array_equal(leaf, 0.0)
    w = params["blocks"]["mlp"]["w_in"]
    assert not np.array_equal(w[0], w[1]), "layers must not share their draw"


def test_the_tied_embedding_is_one_leaf_with_the_gradient_of_both_uses():
    params = init_params(MODEL, jax.random.key(0))
    untied = dataclasses.replace(MODEL, tied_embeddings=False)
    assert "head" not in params and unembedding(params) is params["embed"]["tokens"]
    apart = params | {"head": {"w": params["embed"]["tokens"]}}
    tokens_BT = tokens(MODEL)

    def loss(config):
        return lambda params: -jnp.mean(jax.nn.log_softmax(forward(config, params, tokens_BT))[:, :-1, 3])

    grad, grad_apart = jax.jit(jax.grad(loss(MODEL)))(params), jax.jit(jax.grad(loss(untied)))(apart)
    both = grad_apart["embed"]["tokens"] + grad_apart["head"]["w"]
    np.testing.assert_allclose(grad["embed"]["tokens"], both, atol=1e-7)
    assert jnp.any(grad_apart["embed"]["tokens"]) and jnp.any(grad_apart["head"]["w"])


def test_padding_of_the_vocabulary_is_never_seen():
    config, padded = VARIANTS["gpt2"], dataclasses.replace(MODEL, vocab_multiple=48)
    params = init_params(config, jax.random.key(0))
    rows = jnp.pad(params["embed"]["tokens"], ((0, 32), (0, 0)), constant_values=5.0)
    wider = params | {"embed": params["embed"] | {"tokens": rows}}
    tokens_BT = tokens(config)
    np.testing.assert_array_equal(forward(padded, wider, tokens_BT), forward(config, params, tokens_BT))


@pytest.mark.parametrize(
    "compute",
    [Compute(remat="dots"), Compute(remat="full"), Compute(unroll=1), Compute(unroll=1, remat="full")],
    ids=str,
)
def test_remat_and_unroll_change_no_gradient(compute):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), grads(compute), grads(Compute()))


@functools.cache
def grads(compute: Compute) -> dict:
    params, tokens_BT = init_params(MODEL, jax.random.key(0)), tokens(MODEL)
    return jax.jit(jax.grad(lambda p: jnp.mean(forward(MODEL, p, tokens_BT, compute=compute) ** 2)))(params)


def test_remat_recomputes():
    params = init_params(MODEL, jax.random.key(0))

    def products(remat):
        loss = jax.grad(
            lambda p: jnp.mean(forward(MODEL, p, tokens(MODEL), compute=Compute(remat=remat, unroll=1)) ** 2)
        )
        return str(jax.make_jaxpr(loss)(params)).count("dot_general")

    # The loop over layers stands there once. What a block adds last is not asked for in the backward pass.
    assert products("full") - products("dots") == 3
    assert products("dots") > products("none")  # attention's own


def test_bfloat16_stays_close_to_float32():
    params = init_params(MODEL, jax.random.key(0))
    exact = forward(MODEL, params, tokens(MODEL))
    rounded = forward(MODEL, params, tokens(MODEL), compute=Compute("bfloat16"))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.03 * float(jnp.abs(exact).max()))  # 8 bits, a few roundings


def test_dropout_acts_only_with_a_key():
    config = dataclasses.replace(MODEL, dropout=0.5)
    params = init_params(config, jax.random.key(0))
    tokens_BT, positions_BT = tokens(config), jnp.broadcast_to(jnp.arange(16)[None], (2, 16))

    def run(key):
        return np.asarray(hidden_states(config, params, tokens_BT, positions_BT, key=key))

    np.testing.assert_array_equal(run(None), run(None))
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.array_equal(run(jax.random.key(1)), run(jax.random.key(2)))
    assert not np.array_equal(run(jax.random.key(1)), run(None))
