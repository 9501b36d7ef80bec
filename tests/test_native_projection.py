"""Kernels of decoding, against NumPy and against decoding without them.

Shape suffixes: N rows, K contracted, F outputs; B sequence, G key heads, H query heads, S slot, C head_dim.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.decode import DecodingModel, generate, prefilled
from gptjax.generation.weights import decoding_weights
from gptjax.machine.native import build
from gptjax.ops.attention import cached_attention, cached_attention_reference
from gptjax.ops.projection import dequantized, make_projection, project
from tests.native.kernels import kernels_of, need
from tests.tiny import extend, init_params


@pytest.fixture(autouse=True)
def need_kernels():
    need()


SIZES = [(768, 96), (100, 57), (13, 1), (96, 300)]
ROWS = [1, 2, 5, 8, 16, 17, 32, 40, 200, 300]


@pytest.fixture
def without_kernels(monkeypatch):
    """Calls a function with the kernels turned off. All programs are compiled again, before and after it."""

    def call(function, *args):
        jax.clear_caches()
        with monkeypatch.context() as patch:
            patch.setattr(build, "ready", lambda: False)
            result = function(*args)
        jax.clear_caches()
        return result

    return call


def test_weights_are_those_of_the_layout_for_xla(without_kernels):
    cases = []
    for dtype, (K, F), outputs_first in itertools.product(["bfloat16", "int8"], SIZES, [False, True]):
        w_KF = np.random.default_rng(0).standard_normal((K, F), np.float32)
        cases.append((K, (jnp.asarray(w_KF.T if outputs_first else w_KF), dtype, False, outputs_first)))
    make = jax.jit(make_projection, static_argnums=(1, 2, 3))

    def all_weights():
        made = [(K, make(*arguments)) for K, arguments in cases]
        return [(weights.w.ndim, np.asarray(dequantized(weights, K))) for K, weights in made]

    for _, (w, *options) in cases:
        assert kernels_of(lambda w, options=options: make_projection(w, *options), w) == {"pack_weights"}
    for (ndim, ours), (other_ndim, expected), (_, case) in zip(
        all_weights(), without_kernels(all_weights), cases, strict=True
    ):
        assert (ndim, other_ndim) == (5, 2)
        np.testing.assert_array_equal(ours, expected, err_msg=str(case[1:]))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("K", "F"), SIZES)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_small_batch_matmuls_equal_numpy(dtype, K, F, rows):
    random = np.random.default_rng(rows)
    projection = make_projection(jnp.asarray(random.standard_normal((K, F), np.float32)), dtype, rows == 1)
    x_NK = random.standard_normal((rows, K), np.float32) * np.exp(random.standard_normal((rows, 1), np.float32))
    read_NK = np.asarray(jnp.asarray(x_NK, jnp.bfloat16) if dtype == "bfloat16" else x_NK, np.float64)
    expected_NF = read_NK @ np.asarray(dequantized(projection, K), np.float64)
    assert kernels_of(project, jnp.asarray(x_NK), projection) == {"small_batch_matmul"}
    actual_NF = np.asarray(jax.jit(project)(jnp.asarray(x_NK), projection))
    # bfloat16: sums are of float32. int8: a row's numbers are off by half of one in 127 * 254 of the largest.
    largest_N1 = np.abs(x_NK).max(1, keepdims=True)
    weights_F = np.abs(np.asarray(dequantized(projection, K), np.float64)).sum(0)
    error = 1e-5 if dtype == "bfloat16" else 0.51 / (127 * 254) + 1e-6
    assert np.all(np.abs(actual_NF - expected_NF) <= error * largest_N1 * weights_F[None])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_row_does_not_depend_on_the_number_of_rows(dtype):
    x_NK = jax.random.normal(jax.random.key(0), (37, 96))
    projection = make_projection(jax.random.normal(jax.random.key(1), (96, 70)), dtype, False)
    whole_NF = project(x_NK, projection)
    for rows in (2, 16, 33):
        np.testing.assert_array_equal(project(x_NK[:rows], projection), whole_NF[:rows])


def test_nan_in_a_row_stays_in_that_row():
    x_NK = jnp.ones((3, 64)).at[1, 5].set(jnp.nan)
    y_NF = project(x_NK, make_projection(jnp.ones((64, 40)), "int8", False))
    np.testing.assert_array_equal(jnp.isnan(y_NF).all(1), [False, True, False])
    np.testing.assert_array_equal(jnp.isnan(y_NF).any(1), [False, True, False])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("B", "G", "R", "S", "C"), [(3, 2, 1, 70, 64), (2, 1, 3, 5, 80), (1, 2, 2, 128, 16)])
def test_one_position_attends_to_the_visible_slots_of_the_cache(dtype, B, G, R, S, C):
    random = np.random.default_rng(0)
    q_B1HC = random.standard_normal((B, 1, G * R, C), np.float32) * 3
    k_BGSC, v_BGSC = (jnp.asarray(random.standard_normal((B, G, S, C)), dtype) for _ in range(2))
    slot_S = np.arange(S)
    visible_B1S = np.stack([(slot_S >= b) & (slot_S <= S - 2 - b) for b in range(B)])[:, None]
    visible_B1S[0, 0, 1] = False
    k, v = (np.repeat(np.asarray(x, np.float64), R, axis=1) for x in (k_BGSC, v_BGSC))
    scores_BHS = np.einsum("bhc,bhsc->bhs", q_B1HC[:, 0], k) / np.sqrt(C)
    weights_BHS = np.where(visible_B1S, np.exp(scores_BHS - scores_BHS.max(-1, keepdims=True)), 0)
    expected_BHC = np.einsum("bhs,bhsc->bhc", weights_BHS / weights_BHS.sum(-1, keepdims=True), v)
    unseen_BGSC = ~visible_B1S[:, :, :, None]  # other slots must have no influence
    v_BGSC = jnp.where(unseen_BGSC, jnp.asarray(1e6, dtype), v_BGSC)
    assert kernels_of(cached_attention, q_B1HC, k_BGSC, v_BGSC, visible_B1S) == {"cached_attention"}
    actual_B1HC = jax.jit(cached_attention)(q_B1HC, k_BGSC, v_BGSC, visible_B1S)
    np.testing.assert_allclose(actual_B1HC[:, 0], expected_BHC, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_one_position_is_that_of_the_reference(dtype):
    random = np.random.default_rng(0)
    q_B1HC, k_BGSC, v_BGSC = (
        jnp.asarray(random.standard_normal(shape), dtype) for shape in ((3, 1, 4, 16), (3, 2, 5, 16), (3, 2, 5, 16))
    )
    visible_B1S = jnp.asarray(random.integers(0, 2, (3, 1, 5)), bool).at[:, :, 2].set(True)

    def gradients(function):
        return jax.jit(
            jax.grad(lambda *qkv: jnp.sum(jnp.sin(function(*qkv, visible_B1S).astype("float32"))), (0, 1, 2))
        )(q_B1HC, k_BGSC, v_BGSC)

    found, expected = gradients(cached_attention), gradients(cached_attention_reference)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(a.astype("float32"), b.astype("float32"), atol=1e-5 if dtype == "float32" else 0.02)


MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=57)
PROMPTS = [np.random.default_rng(length).integers(0, 57, length) for length in (4, 9, 2)]


@pytest.fixture(scope="module")
def params():
    """Scaled so that logits differ clearly, but rounding errors do not grow from layer to layer."""
    drawn = init_params(MODEL, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf + 0.1, drawn)


def test_greedy_samples_are_those_without_kernels(without_kernels, params):
    def samples():
        found = {}
        for rows, quantize in itertools.product([1, 3], ["int8", "none"]):
            options = SampleConfig(max_new_tokens=20, temperature=0.0, quantize=quantize)
            tokens = generate(MODEL, params, PROMPTS[:rows], options)
            found[rows, quantize] = [row[0].tolist() for row in tokens]
        return found

    assert samples() == without_kernels(samples)


def test_logits_of_bfloat16_are_nearly_those_without_kernels(without_kernels, params):
    """Both round activations; the kernels also round keys and values in the cache."""

    def last_logits(rows, stored):
        weights = decoding_weights(MODEL, params, "bfloat16", rows == 1)
        cache = prefilled(DecodingModel(MODEL, weights, "float32", stored), PROMPTS[:rows], 64)
        last_B1 = jnp.asarray([[prompt[-1]] for prompt in PROMPTS[:rows]])
        x_B1D, _ = extend(MODEL, weights.params, last_B1, cache, "float32")
        return np.asarray(project(x_B1D, weights.readout)[:, 0])

    ours = [last_logits(rows, "bfloat16") for rows in (1, 3)]
    expected = without_kernels(lambda: [last_logits(rows, "float32") for rows in (1, 3)])
    for found, wanted in zip(ours, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())
