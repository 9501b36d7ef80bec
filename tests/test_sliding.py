"""A cache that slides, and layers that hold only their window, against one forward pass without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.decode import generate, sliding_slots
from gptjax.model.cache import grow_cache, init_cache
from gptjax.model.gpt import Compute, logits
from tests.numpy_decoder import NumpyDecoder
from tests.test_model_parity import make_params
from tests.tiny import extend, hidden_states, layer_by_layer

CONTEXT, LENGTH = 12, 40
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=CONTEXT, vocab_size=31, positions="rope")
TOKENS = np.random.default_rng(0).integers(0, 31, (2, LENGTH))


def reference(model, params, tokens_BT):
    """Logits of a forward pass over a whole text, in which every token sees the newest `block_size`."""
    window = min(model.attention_window or model.block_size, model.block_size)
    long = dataclasses.replace(model, block_size=LENGTH + 8, attention_window=window)
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD = hidden_states(long, params, jnp.asarray(tokens_BT), positions_BT, compute=Compute(unroll=1))
    return np.asarray(logits(long, params, x_BTD))


def cached(model, params, cache, tokens_BT, chunks):
    """Logits of the same tokens in chunks, each after what is in the cache."""
    layers, parts, start = layer_by_layer(model, params), [], 0
    for length in chunks:
        x_BTD, cache = extend(model, layers, tokens_BT[:, start : start + length], cache, "float32")
        parts.append(np.asarray(logits(model, params, x_BTD)))
        start += length
    assert start == tokens_BT.shape[1]
    return np.concatenate(parts, axis=1), cache


@pytest.mark.parametrize("positions", ["rope", "alibi", "t5", "none"])
def test_a_full_cache_slides_by_a_token(positions):
    """The second row begins three slots later, so its padding leaves the cache first."""
    model = dataclasses.replace(MODEL, positions=positions)
    params = make_params(model)
    cache = init_cache(model, jnp.array([0, 3]), 14, "float32")
    padded = np.concatenate([TOKENS[:1], np.pad(TOKENS[1:, :-3], ((0, 0), (3, 0)))])
    found, _ = cached(model, params, cache, padded, [8] + [1] * (LENGTH - 8))
    expected = reference(model, params, TOKENS)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[1, 3:], expected[1, :-3], atol=1e-4)
    if positions != "none":
        whole = dataclasses.replace(model, block_size=LENGTH)
        assert np.abs(expected - reference(whole, params, TOKENS))[:, CONTEXT + 2 :].max() > 1e-3, "the window matters"


@pytest.mark.parametrize("positions", ["rope", "alibi", "t5"])
def test_first_tokens_stay_when_the_context_slides(positions):
    """Streaming LLM (arXiv:2309.17453): memory is that of one context, and distances are no longer than those in it."""
    model = dataclasses.replace(MODEL, positions=positions, attention_sinks=2, n_kv_head=1)
    model = dataclasses.replace(model, attention_pattern=("full", "local"), attention_window=5)
    params = make_params(model)
    cache = init_cache(model, jnp.array([0, 3]), 16, "float32", chunk=8)
    assert [layer.k_BGSC.shape[2] for layer in cache.layers] == [18, 18]
    padded = np.concatenate([TOKENS[:1], np.pad(TOKENS[1:, :-3], ((0, 0), (3, 0)))])
    found, _ = cached(model, params, cache, padded, [8, 1, 2] + [1] * (LENGTH - 11))
    expected = np.stack([NumpyDecoder(model, params, slides=True).logits(row) for row in TOKENS])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[1, 3:], expected[1, :-3], atol=1e-4)
    forgets = dataclasses.replace(model, attention_sinks=0)
    others = np.stack([NumpyDecoder(forgets, params, slides=True).logits(row) for row in TOKENS[:1]])
    assert np.abs(expected[0] - others[0])[CONTEXT:].max() > 1e-3, "first tokens matter"


def test_layers_with_a_window_hold_only_that():
    model = dataclasses.replace(MODEL, block_size=LENGTH, attention_window=5, attention_pattern=("local", "full"))
    params = make_params(model)
    cache = init_cache(model, jnp.zeros(2, jnp.int32), 24, "float32", chunk=8)
    assert [layer.k_BGSC.shape[2] for layer in cache.layers] == [16, 24]
    first, cache = cached(model, params, cache, TOKENS[:, :24], [8, 8, 8])
    cache = grow_cache(model, cache, LENGTH, 8)
    assert [layer.k_BGSC.shape[2] for layer in cache.layers] == [16, LENGTH]
    rest, cache = cached(model, params, cache, TOKENS[:, 24:], [8] + [1] * 8)
    positions_BT = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
    x_BTD = hidden_states(model, params, jnp.asarray(TOKENS), positions_BT, compute=Compute(unroll=1))
    found = np.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(found, logits(model, params, x_BTD), atol=1e-4)


def test_samples_pass_the_context_without_a_jump():
    """Greedy tokens are the most likely ones of one pass over the whole text; rows have prompts of unequal lengths."""
    params, told = jax.tree.map(lambda p: 2.0 * p, make_params(MODEL)), []
    prompts = [np.asarray(TOKENS[0, :3], np.int32), np.asarray(TOKENS[1, :9], np.int32)]
    options = SampleConfig(max_new_tokens=30, temperature=0.0)
    for prompt, [sample] in zip(prompts, generate(MODEL, params, prompts, options, notify=told.append), strict=True):
        text = np.concatenate([prompt, sample])[None]
        assert text.shape[1] == len(prompt) + 30
        expected = reference(MODEL, params, text)[0, len(prompt) - 1 : -1]
        assert sample.tolist() == expected.argmax(-1).tolist()
    assert told == ["the context is full (model.block_size=12): it slides by a token at a time"]


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_samples_keep_their_first_tokens(positions):
    """Past the context, and where positions do not allow sliding, in the context that is read again."""
    model, told = dataclasses.replace(MODEL, positions=positions), []
    params = jax.tree.map(lambda p: 2.0 * p, make_params(model))
    prompt = np.asarray(TOKENS[0], np.int32)
    options = SampleConfig(max_new_tokens=9, temperature=0.0, attention_sinks=2)
    [[sample]] = generate(model, params, [prompt], options, notify=told.append)
    context = np.concatenate([prompt[:2], prompt[-10:]])  # of 12 tokens
    sinks, length = dataclasses.replace(model, attention_sinks=2), len(context)
    if positions == "rope":
        text = np.concatenate([context, sample])
        logits = NumpyDecoder(sinks, params, slides=True).logits(text)
        assert sample.tolist() == logits[length - 1 : -1].argmax(-1).tolist()
        how = "by a token at a time"
    else:
        for token in sample:
            if len(context) > 12:
                context = np.concatenate([context[:2], context[-4:]])
            assert token == NumpyDecoder(sinks, params).logits(context)[-1].argmax()
            context = np.append(context, token)
        how = "to its last 4 tokens"
    assert told == [
        "the prompt has 40 tokens; the model reads its first 2 and its last 10 (model.block_size)",
        f"the context is full (model.block_size=12): it slides {how}; its first 2 stay",
    ]


def test_a_long_sample_needs_the_slots_of_one_context():
    assert sliding_slots(MODEL, 16, 1000) == 64
    assert sliding_slots(dataclasses.replace(MODEL, block_size=100), 16, 1000) == 128
    assert sliding_slots(dataclasses.replace(MODEL, block_size=1000), 16, 100) == 128
