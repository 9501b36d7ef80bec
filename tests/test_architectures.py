"""Every variant of the block against a decoder in NumPy, on each path: training, packed documents, cached decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.errors import UserError
from gptjax.model import gpt
from gptjax.model.attention import explain_attention
from gptjax.model.cache import init_cache
from gptjax.model.gpt import Compute, finish_logits, unembedding
from gptjax.model.positions import POSITIONS, rope_frequencies
from gptjax.ops.activations import ACTIVATIONS
from gptjax.ops.axes import HEADS
from tests.numpy_decoder import NumpyDecoder
from tests.tiny import init_params, layer_by_layer

BASE = ModelConfig(vocab_size=37, vocab_multiple=8, block_size=48, n_layer=2, n_head=4, n_embd=16)
LLAMA = {"norm": "rms", "norm_epsilon": 1e-6, "activation": "silu", "gated": True, "bias": False, "positions": "rope"}
VARIANTS = {
    "gpt2": {},
    "post norm, exact gelu": {"norm_position": "post", "activation": "gelu_exact"},
    "llama": {**LLAMA, "n_kv_head": 2, "tied_embeddings": False},
    "output norms, qk norm of all heads": {**LLAMA, "norm_position": "output", "qk_norm": "all", "n_kv_head": 2},
    "sandwich, soft caps, local and full": {
        **{"norm": "rms", "norm_position": "sandwich", "attention_softcap": 2.0, "logit_softcap": 3.0, "bias": False},
        **{"attention_pattern": ("local", "full"), "attention_window": 5, "n_layer": 3, "embedding_scale": 4.0},
        **{"positions": "rope", "rope_local_base": 100.0, "gated": True, "attention_scale": 0.2, "head_dim": 8},
        **{"rope_scaling": "linear", "rope_factor": 3.0},
    },
    "parallel, partial rope": {"parallel": "two_norms", "positions": "rope", "rope_fraction": 0.5, "output_bias": True},
    "parallel with one norm": {"parallel": "one_norm", "positions": "rope", "activation": "relu"},
    "modern speedrun": {
        **{"norm": "rms", "norm_scale": False, "activation": "relu2", "bias": False, "positions": "rope"},
        **{"qk_norm": "head", "residual_mix": True, "embedding_norm": True, "logit_softcap": 15.0, "mlp_width": 24},
        **{"tied_embeddings": False, "rope_base": 1024.0, "value_residual": True, "learned_skips": True, "n_layer": 3},
    },
    "multipliers": {**LLAMA, "residual_scale": 0.3, "logit_scale": 0.5, "embedding_scale": 2.0, "attention_scale": 0.4},
    "biases on queries, keys, values": {**LLAMA, "qkv_bias": True, "rope_scaling": "linear", "rope_factor": 4.0},
    "layers without rotation": {**LLAMA, "n_layer": 4, "attention_pattern": ("full", "full_nope")},
    "strided and fixed, a window with sinks": {
        **{"positions": "rope", "attention_pattern": ("strided", "local", "fixed"), "attention_stride": 5},
        **{"attention_summary": 2, "attention_window": 4, "attention_sinks": 2, "n_layer": 3},
    },
    "alibi": {"positions": "alibi", "activation": "tanh", "norm": "rms"},
    "t5": {"positions": "t5", "activation": "sigmoid", "attention_window": 9},
    "shaw": {"positions": "shaw", "relative_distance": 3, "relative_values": True, "n_kv_head": 2, "bias": False},
    "sinusoidal": {"positions": "sinusoidal", "gated": True},
    "mixture of experts": {**LLAMA, "n_expert": 4, "expert_width": 12},
    "experts, one shared, roomy": {
        **{"bias": False, "n_expert": 3, "experts_per_token": 1, "n_shared_expert": 1, "expert_capacity": 3.0},
    },
    "none": {"positions": "none", "qk_norm": "head"},
}
COMPUTE = Compute(unroll=1)
every_variant = pytest.mark.parametrize("name", VARIANTS)


def config_of(name: str) -> ModelConfig:
    return dataclasses.replace(BASE, **VARIANTS[name])


@functools.cache
def params_of(config: ModelConfig) -> dict:
    """Parameters in which nothing is zero or one, and attention is far from uniform."""
    drawn = jax.jit(gpt.init_params, static_argnums=0)(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(drawn)
    random = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [jnp.asarray(leaf + random.normal(0, 0.2, leaf.shape), "float32") for leaf in leaves]
    )


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def logits_of(config, params, tokens_BT, positions_BT, segments_BT=None, compute=COMPUTE):
    x_BTD = gpt.hidden_states(config, params, tokens_BT, positions_BT, segments_BT, compute=compute)
    return gpt.logits(config, params, x_BTD)


TOKENS = np.random.default_rng(0).integers(0, 37, (2, 24))
POSITIONS_BT = np.broadcast_to(np.arange(24), (2, 24))


@every_variant
def test_logits_are_those_of_numpy(name):
    config = config_of(name)
    params = params_of(config)
    actual = logits_of(config, params, TOKENS, POSITIONS_BT)
    reference = NumpyDecoder(config, params)
    for row, tokens in zip(actual, TOKENS, strict=True):
        expected = reference.logits(tokens)
        # float32 sums against float64
        np.testing.assert_allclose(row, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "sandwich, soft caps, local and full", "alibi", "t5"])
def test_whole_texts_and_prefixes_are_those_of_numpy(name, bidirectional):
    config = dataclasses.replace(config_of(name), bidirectional=bidirectional)
    params = params_of(config)
    ahead = None if bidirectional else jnp.broadcast_to(jnp.arange(24) < 9, (2, 24))
    x_BTD = jax.jit(gpt.hidden_states, static_argnums=0)(config, params, TOKENS, POSITIONS_BT, ahead_BT=ahead)
    actual = gpt.logits(config, params, x_BTD)
    reference = NumpyDecoder(config, params, prefix=9)
    for row, tokens in zip(actual, TOKENS, strict=True):
        expected = reference.logits(tokens)
        np.testing.assert_allclose(row, expected, atol=2e-4 * np.abs(expected).max())


# What these add to the others acts on each position alone.
BY_POSITION = (
    *("post norm, exact gelu", "output norms, qk norm of all heads", "parallel with one norm", "multipliers"),
    "biases on queries, keys, values",
)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in BY_POSITION])
def test_documents_packed_together_are_those_alone(name):
    config = config_of(name)
    params = params_of(config)
    segments = np.broadcast_to((np.arange(24) >= 10).astype(np.int32), (2, 24))
    positions = np.broadcast_to(np.where(np.arange(24) < 10, np.arange(24), np.arange(24) - 10), (2, 24))
    packed = logits_of(config, params, TOKENS, positions, segments)
    alone = NumpyDecoder(config, params)
    for row, tokens in zip(packed, TOKENS, strict=True):
        expected = np.concatenate([alone.logits(tokens[:10]), alone.logits(tokens[10:])])
        np.testing.assert_allclose(row, expected, atol=2e-4 * np.abs(expected).max())


@every_variant
def test_prefill_and_cached_steps_are_one_pass(name):
    config = config_of(name)
    params = params_of(config)
    whole = logits_of(config, params, TOKENS, POSITIONS_BT)
    layers = layer_by_layer(config, params)

    @jax.jit
    def extend(tokens_BT, cache):
        x_BTD, cache = gpt.extend(config, layers, tokens_BT, cache, "float32")
        w_VD = unembedding(params)[: config.vocab_size]
        return finish_logits(config, layers, jnp.einsum("btd,vd->btv", x_BTD, w_VD)), cache

    # The second row's prompt is shorter: its slots are padded on the left.
    cache, parts = init_cache(config, jnp.array([0, 3]), 48, "float32"), []
    tokens = np.concatenate([TOKENS[:1], np.pad(TOKENS[1:, :-3], ((0, 0), (3, 0)))])
    for start, stop in ((0, 11), (11, 12), (12, 13), (13, 24)):
        part, cache = extend(tokens[:, start:stop], cache)
        parts.append(part)
    cached = np.concatenate(parts, axis=1)
    scale = np.abs(whole).max()
    np.testing.assert_allclose(cached[0], whole[0], atol=2e-5 * scale)
    np.testing.assert_allclose(cached[1, 3:], whole[1, :-3], atol=2e-5 * scale)


@pytest.mark.parametrize("name", ["sandwich, soft caps, local and full", "modern speedrun", "t5", "alibi"])
def test_recomputing_in_the_backward_pass_changes_no_gradient(name):
    config = config_of(name)
    params = params_of(config)

    def gradient(remat, unroll):
        def loss(params):
            return jnp.mean(
                logits_of(config, params, TOKENS, POSITIONS_BT, None, Compute(remat=remat, unroll=unroll)) ** 2
            )

        return jax.jit(jax.grad(loss))(params)

    plain, again = gradient("none", 1), gradient("full", 0)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), plain, again)
    unused = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(plain) if not leaf.any()]
    assert not unused, "every parameter has a gradient"


def test_the_tables_and_the_config_name_the_same_methods():
    fields = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    assert set(POSITIONS) == set(fields["positions"].__args__)
    assert set(ACTIVATIONS) == set(fields["activation"].__args__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_base": 5.0}, "model.rope_base=5.0 has no effect without model.positions=rope"),
        ({"positions": "rope", "rope_factor": 2.0}, "rope_factor=2.0 has no effect without model.rope_scaling"),
        ({"qkv_bias": True}, "qkv_bias=True has no effect without model.bias=false"),
        ({"attention_pattern": ("full", "local")}, "local layers need a window"),
        ({"attention_pattern": ("full", "full_nope")}, "they need model.positions=rope"),
        ({"attention_pattern": ("full", "strided")}, "fixed and strided layers need it"),
        ({"relative_values": True}, "relative_values=True has no effect without model.positions=shaw"),
        ({"attention_stride": 4}, "fixed and strided layers need it"),
        (
            {"attention_pattern": ("fixed",), "attention_stride": 4, "attention_summary": 4},
            "more than model.attention_s",
        ),
        ({"attention_sinks": 3, "bidirectional": True}, "attention_sinks=3 has no effect without a window"),
        ({"attention_sinks": 40, "attention_window": 9}, "together must be at most model.block_size=48"),
        ({"parallel": "one_norm", "norm_position": "post"}, "parallel='one_norm' has no effect without"),
        ({"positions": "rope", "rope_fraction": 0.1}, "rotates no pair of 4 channels"),
    ],
)
def test_options_that_do_not_apply_together_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **change)


@pytest.mark.parametrize(
    "name",
    [
        *("sandwich, soft caps, local and full", "alibi", "t5", "mixture of experts"),
        pytest.param("shaw", marks=pytest.mark.slow),
        pytest.param("strided and fixed, a window with sinks", marks=pytest.mark.slow),
        pytest.param("modern speedrun", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing(name):
    from gptjax.config.mesh import MeshConfig
    from gptjax.parallel.mesh import make_mesh, traced_in
    from gptjax.parallel.rules import shardings

    config = config_of(name)
    params = params_of(config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    assert mesh.shape[HEADS] == 2
    placed = jax.device_put(params, shardings(mesh, params))
    sharded = jax.jit(traced_in(mesh, functools.partial(logits_of.__wrapped__, config)))
    np.testing.assert_allclose(
        sharded(placed, TOKENS, POSITIONS_BT), logits_of(config, params, TOKENS, POSITIONS_BT), atol=2e-4
    )


def test_the_speedrun_initialization_starts_at_the_embeddings():
    """Output projections are zero, so the first logits are zero too; matrices fill sqrt(3 / n_embd) evenly."""
    config = dataclasses.replace(config_of("modern speedrun"), init="uniform")
    params = init_params(config, jax.random.key(0))
    assert not logits_of(config, params, TOKENS, POSITIONS_BT).any()
    w_in = params["blocks"]["mlp"]["w_in"]
    assert 0.9 * (3 / 16) ** 0.5 < jnp.abs(w_in).max() <= (3 / 16) ** 0.5


def test_llama3_scaling_reads_its_two_factors():
    config = ModelConfig(positions="rope", rope_scaling="llama3", rope_factor=8.0, rope_original_length=64)
    base = rope_frequencies(config, 1e4)[0]
    for change in ({"rope_low_frequency_factor": 2.0}, {"rope_high_frequency_factor": 8.0}):
        assert (rope_frequencies(dataclasses.replace(config, **change), 1e4)[0] != base).any()


def test_rope_scaling_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="needs the extra gptjax[parity]")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for kind, extra in {
        "linear": {},
        "yarn": {"original_max_position_embeddings": 256},
        "llama3": {"original_max_position_embeddings": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }.items():
        theirs = transformers.LlamaConfig(
            hidden_size=64, num_attention_heads=2, max_position_embeddings=1024,
            rope_parameters={"rope_type": kind, "factor": 4.0, "rope_theta": 10_000.0, **extra},
        )  # fmt: skip
        expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
        length = {} if kind == "linear" else {"rope_original_length": 256}
        config = ModelConfig(n_embd=64, n_head=2, positions="rope", rope_scaling=kind, rope_factor=4.0, **length)
        frequencies, magnitude = rope_frequencies(config, 10_000.0)
        np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
        assert magnitude == pytest.approx(factor)


def test_the_choice_of_attention_is_explained(monkeypatch):
    config = dataclasses.replace(BASE, block_size=100, n_embd=128)
    assert explain_attention(config, 1, "bfloat16", True, False).startswith("blocked (not C++ kernel: ")
    capped = dataclasses.replace(config, attention_softcap=5.0)
    assert "logits are capped or biased" in explain_attention(capped, 1, "float32", True, False)
    assert explain_attention(dataclasses.replace(config, positions="t5"), 1, "float32", True, False).startswith(
        "plain ("
    )
    local = dataclasses.replace(config, attention_pattern=("local", "full"), attention_window=8)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    explained = explain_attention(local, 1, "bfloat16", True, False)
    assert explained.startswith("plain (not splash: 100 positions are no multiple of 128; not blocked: ")
