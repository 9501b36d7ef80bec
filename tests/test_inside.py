"""What `gptjax inspect` shows is what the model computes: against the model, and attention against NumPy."""

import base64

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.evaluation.inside import inspect_text
from gptjax.model import gpt
from gptjax.model.inside import look_inside
from gptjax.report.inspect_page import render_inspection
from tests.test_report import HOSTILE, Page
from tests.tiny import MODEL, init_params

SMALL = {"vocab_size": 40, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
MODELS = {
    "gpt2": MODEL,
    "modern": ModelConfig(
        **SMALL, n_kv_head=1, positions="rope", norm="rms", qk_norm="head", bias=False, attention_window=3,
        attention_pattern=("local", "full"), attention_softcap=5.0, residual_mix=True, tied_embeddings=False,
        value_residual=True, learned_skips=True,
    ),
    "post": ModelConfig(**SMALL, norm_position="post"),
    "parallel": ModelConfig(**SMALL, parallel="one_norm", positions="alibi"),
}  # fmt: skip


def drawn(config: ModelConfig, seed: int = 0) -> dict:
    """Parameters ten times as large as at the start of training, so that attention is not uniform."""
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 2 else leaf, init_params(config, jax.random.key(seed)))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_stream_gives_the_models_logits_and_weights_are_those_of_attention(name):
    config = MODELS[name]
    params, T = drawn(config), 12
    tokens_T = np.random.default_rng(3).integers(0, config.vocab_size, T)
    inside = jax.jit(look_inside, static_argnums=0)(config, params, jnp.asarray(tokens_T)[None])
    positions_BT = jnp.arange(T)[None]
    states = jax.jit(gpt.hidden_states, static_argnums=0)(config, params, jnp.asarray(tokens_T)[None], positions_BT)
    logits = np.asarray(gpt.logits(config, params, states)[0], np.float64)
    log_TV = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    weights = np.asarray(inside.weights_NBHTS)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
    assert not np.triu(weights, 1).any() and np.tril(weights).std() > 0.05
    if config.attention_window:
        assert not weights[0, 0, 0, 9, :7].any() and weights[1, 0, 0, 9, :7].any()
    found = inspect_text(config, params, tokens_T)
    np.testing.assert_allclose(found.log_probabilities_T[1:], log_TV[np.arange(T - 1), tokens_T[1:]], atol=2e-5)
    assert np.isnan(found.log_probabilities_T[0]) and found.ranks_T[0] == -1
    order = np.argsort(-log_TV, axis=-1)
    np.testing.assert_array_equal(found.top_tokens_TK, order[:, :10])
    np.testing.assert_allclose(found.top_logits_TK, np.take_along_axis(logits, order[:, :10], -1), atol=2e-4)
    np.testing.assert_array_equal(found.ranks_T[1:], [list(order[t]).index(tokens_T[t + 1]) for t in range(T - 1)])
    np.testing.assert_allclose(found.lens_probabilities_NTK[-1], found.top_probabilities_TK[:, :3], atol=1e-5)
    np.testing.assert_allclose(found.lens_next_NT[-1, :-1], np.exp(found.log_probabilities_T[1:]), rtol=1e-4, atol=1e-7)
    assert np.isnan(found.lens_next_NT[:, -1]).all()


def test_attention_is_that_of_numpy():
    config, params = MODEL, drawn(MODEL)
    tokens_T = np.arange(8) * 5
    weights = jax.jit(look_inside, static_argnums=0)(config, params, jnp.asarray(tokens_T)[None]).weights_NBHTS[0, 0]
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = p["embed"]["tokens"][tokens_T] + p["embed"]["positions"][:8]
    norm, attn = (jax.tree.map(lambda leaf: leaf[0], p["blocks"][part]) for part in ("norm_1", "attn"))
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon)
    h = h * norm["scale"] + norm["bias"]
    qkv = np.einsum("td,dgec->tgec", h, attn["w_qkv"]) + attn["b_qkv"]
    for head in range(config.n_head):
        scores = qkv[:, head, 0] @ qkv[:, head, 1].T / np.sqrt(config.head_width)
        scores[np.triu_indices(8, 1)] = -np.inf
        expected = np.exp(scores - scores.max(-1, keepdims=True))
        np.testing.assert_allclose(weights[head], expected / expected.sum(-1, keepdims=True), atol=2e-6)


def test_the_page_has_the_numbers_and_no_text_acts_in_it():
    found = inspect_text(MODEL, drawn(MODEL), np.arange(6) * 9)
    harmless, page = (Page(render_inspection(found, name, lambda token: name)) for name in ("run", HOSTILE))  # noqa: B023
    assert page.tags == harmless.tags and page.scripts[1] == harmless.scripts[1] and HOSTILE in page.text
    packed = np.frombuffer(base64.b64decode(page.data["weights"]), "<u2").reshape(2, 2, 21) / 65535
    for row, (t, s) in enumerate(zip(*np.tril_indices(6), strict=True)):
        np.testing.assert_allclose(packed[:, :, row], found.weights_NHTS[:, :, t, s], atol=1e-5)
    assert page.data["surprisal"][0] is None
    np.testing.assert_allclose(page.data["surprisal"][1:], -found.log_probabilities_T[1:] / np.log(2), rtol=1e-4)
