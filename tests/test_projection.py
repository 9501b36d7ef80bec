"""Weights laid out for decoding, against the plain product. Shape suffixes: N rows, K contracted, F outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.ops.projection import dequantized, make_projection, project, project_reference

K, F = 48, 40


@pytest.fixture(scope="module")
def w_KF():
    scales = jnp.exp(jax.random.normal(jax.random.key(1), (1, F)))  # outputs of unlike size
    return jax.random.normal(jax.random.key(0), (K, F)) * scales


@pytest.mark.parametrize("rows", [1, 2, 5, 20, 130])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # of the largest output: float32 rounds sums; bfloat16 rounds activations to 8 bits; two int8 hold 16 bits of them
    [("float32", 1e-6), ("bfloat16", 1e-2), ("int8", 1e-4)],
)
def test_projection(w_KF, dtype, tolerance, rows):
    x = jax.random.normal(jax.random.key(2), (1, rows, K)) * 3
    projection = make_projection(w_KF, dtype)
    expected = project_reference(x, projection)
    actual = jax.jit(project)(x, projection)
    assert actual.shape == (1, rows, F) and actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=tolerance * float(jnp.max(jnp.abs(expected))))


def test_int8_weights_are_off_by_at_most_half_a_step_of_their_output(w_KF):
    error_KF = jnp.abs(dequantized(make_projection(w_KF, "int8")) - w_KF)
    step_F = jnp.max(jnp.abs(w_KF), axis=0) / 127
    assert jnp.all(error_KF <= step_F[None] * 0.5001)


def test_nothing_times_int8_is_nothing(w_KF):
    zeros = make_projection(jnp.zeros((K, F)), "int8")
    assert not jnp.any(project(jnp.ones((1, K)), zeros))
    assert not jnp.any(project(jnp.zeros((1, K)), make_projection(w_KF, "int8")))
