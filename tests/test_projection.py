"""Weights laid out for decoding, compared with a plain matmul. Shape suffixes: N rows, K contracted, F outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.machine.native import build
from gptjax.ops.projection import dequantized, make_projection, project, project_reference
from gptjax.ops.single_row import CACHE_WAY, to_stripes

K, F = 50, 40  # 50 rows are not a multiple of the number of stripes


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Tests the layouts for XLA; `test_native_projection.py` tests those of the C++ kernel."""
    monkeypatch.setattr(build, "ready", lambda: False)


@pytest.fixture(scope="module")
def w_KF():
    scales = jnp.exp(jax.random.normal(jax.random.key(1), (1, F)))  # outputs of different sizes
    return jax.random.normal(jax.random.key(0), (K, F)) * scales


@pytest.mark.parametrize("rows", [1, 2, 5, 20, 130])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Relative to the largest output. Float32 rounds sums, bfloat16 rounds activations to 8 bits, two int8 to 16 bits.
    [("float32", 1e-6), ("bfloat16", 1e-2), ("int8", 1e-4), ("int4", 1e-6)],
)
def test_projection(w_KF, dtype, tolerance, rows):
    x = jax.random.normal(jax.random.key(2), (1, rows, K)) * 3
    projection = make_projection(w_KF, dtype, rows == 1)
    expected = project_reference(x, projection)
    actual = jax.jit(project)(x, projection)
    assert actual.shape == (1, rows, F) and actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=tolerance * float(jnp.max(jnp.abs(expected))))


def test_int8_weights_are_off_by_at_most_half_a_quantization_step(w_KF):
    error_KF = jnp.abs(dequantized(make_projection(w_KF, "int8", False), K) - w_KF)
    step_F = jnp.max(jnp.abs(w_KF), axis=0) / 127
    assert jnp.all(error_KF <= step_F[None] * 0.5001)


def test_int4_weights_take_nine_sixteenths_of_a_byte_and_are_those_of_the_best_scale(w_KF):
    w_KF = np.asarray(jnp.tile(w_KF, (3, 1)))[:128]
    projection = make_projection(jnp.asarray(w_KF), "int4", True)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(projection)) == w_KF.size * 0.5625
    found_KF = np.asarray(dequantized(projection, 128))
    for column in range(F):
        for first in range(0, 128, 32):
            group = w_KF[first : first + 32, column]
            best = np.inf
            for share in (1.0, 0.94, 0.88, 0.82):
                scale = float(jnp.bfloat16(group[np.argmax(np.abs(group))] * share / -8))
                steps = np.array([min(range(-8, 8), key=lambda q, x=x, s=scale: abs(q * s - x)) for x in group])
                best = min(best, np.sum((steps * scale - group) ** 2))
            error = np.sum((found_KF[first : first + 32, column] - group) ** 2)
            assert error == pytest.approx(best, rel=1e-4)


def test_int4_weights_that_are_steps_are_exact():
    w_KF = np.random.default_rng(3).integers(-8, 8, (128, F)) * 2.0**-5
    w_KF[::32] = -8 * 2.0**-5
    projection = make_projection(jnp.asarray(w_KF, jnp.float32), "int4", True)
    np.testing.assert_array_equal(dequantized(projection, 128), w_KF)


@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_layout_does_not_depend_on_how_the_matrix_was_stored(w_KF, dtype, one_row):
    projections = make_projection(w_KF, dtype, one_row), make_projection(w_KF.T, dtype, one_row, True)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, *projections)))
    several = make_projection(w_KF, dtype, False)
    assert jnp.array_equal(dequantized(projections[0], K), dequantized(several, K))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_prompts_and_single_rows_use_the_same_weights(w_KF, dtype):
    x_NK = jax.random.normal(jax.random.key(2), (20, K))
    one, several = (project(x_NK, make_projection(w_KF, dtype, one_row)) for one_row in (True, False))
    np.testing.assert_allclose(one, several, atol=1e-5 * float(jnp.max(jnp.abs(several))))  # sums in another order


@pytest.mark.parametrize(("K", "F"), [(768, 3072), (3072, 768), (768, 768), (768, 50257), (13, 7), (1, 1)])
def test_stripes_start_in_different_cache_sets(K, F):
    w_JGF = jax.eval_shape(to_stripes, jax.ShapeDtypeStruct((K, F), jnp.int8))
    J, G, _ = w_JGF.shape
    assert J * G >= K
    assert G * F % CACHE_WAY


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_single_row_converts_weights_in_the_loop_over_tokens(dtype):
    """If XLA converted them before the loop, it would read four bytes for each weight."""
    projection = make_projection(jax.random.normal(jax.random.key(0), (384, 384)), dtype, True)

    def four_tokens(x, projection):
        return jax.lax.fori_loop(0, 4, lambda _, x: x + project(x, projection), x)

    compiled = jax.jit(four_tokens).lower(jnp.ones((1, 384)), projection).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 384 * 384


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_zero_times_rounded_weights_is_zero(w_KF, dtype):
    zeros = make_projection(jnp.zeros((K, F)), dtype, True)
    assert not jnp.any(project(jnp.ones((1, K)), zeros))
    assert not jnp.any(project(jnp.zeros((1, K)), make_projection(w_KF, dtype, True)))
