"""The TPU's attention kernel in interpret mode, against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gptjax.ops.attention import attention_reference
from gptjax.ops.axes import HEADS, ROWS, per_device
from gptjax.ops.splash import splash_attention, splash_fits

B, T, C = 4, 256, 16


def arrays(kv_heads):
    heads = (4, kv_heads, kv_heads)
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, n, C)) for i, n in enumerate(heads))
    return q, k, v, jnp.cumsum(jax.random.bernoulli(jax.random.key(5), 0.02, (B, T)), axis=1).astype(jnp.int32)


def value_and_gradients(function, q, k, v):
    def objective(q, k, v):
        y = function(q, k, v)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    gradients, y = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x) for x in (y, *gradients)]


@pytest.mark.parametrize(("kv_heads", "segmented", "window"), [(4, False, 0), (2, True, 0), (4, True, 100)])
def test_splash_attention(kv_heads, segmented, window):
    q, k, v, segments = arrays(kv_heads)
    segments = segments if segmented else None
    actual = value_and_gradients(lambda *x: splash_attention(window, *x, segments, interpret=True), q, k, v)
    expected = value_and_gradients(lambda *x: attention_reference(*x, segments, window), q, k, v)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=5e-6 * np.abs(e).max())  # float32 sums in another order


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_splash_attention_on_a_mesh():
    q, k, v, segments = arrays(4)
    mesh = jax.make_mesh(
        (2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:4]
    )
    cut = PartitionSpec(ROWS, None, HEADS)
    call = functools.partial(splash_attention, 0, interpret=True)
    with jax.set_mesh(mesh):
        actual = jax.jit(per_device(call, (cut, cut, cut, PartitionSpec(ROWS)), cut))(q, k, v, segments)
    np.testing.assert_allclose(actual, attention_reference(q, k, v, segments), atol=1e-5)
    assert len(actual.sharding.device_set) == 4


def test_what_the_kernel_cannot_do_is_known():
    assert splash_fits(1024, 0.0)
    assert not splash_fits(1000, 0.0) and not splash_fits(1024, 0.1)
