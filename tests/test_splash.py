"""The TPU's attention kernel in interpret mode, compared with the plain implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gptjax.ops.attention_heads import AttentionInputs
from gptjax.ops.attention_spec import AttentionSpec, Mask, make_request
from gptjax.ops.axes import BATCH, HEADS, per_device
from gptjax.ops.plain_attention import attention_reference
from gptjax.ops.splash_attention import SPLASH, splash_attention

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
    spec, mask = AttentionSpec(window=window, scale=0.3 if window else 0.0), Mask(segments)

    def fast(q, k, v):
        return splash_attention(spec, AttentionInputs(q, k, v, mask), interpret=True)

    actual = value_and_gradients(fast, q, k, v)
    expected = value_and_gradients(lambda *x: attention_reference(*x, spec, mask), q, k, v)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=5e-6 * np.abs(e).max())  # float32 sums in another order


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_splash_attention_on_a_mesh():
    q, k, v, segments = arrays(4)
    mesh = jax.make_mesh((2, 1, 1, 2), (*BATCH, HEADS), axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:4])
    spec = PartitionSpec(BATCH, None, HEADS)

    def call(q, k, v, segments):
        return splash_attention(AttentionSpec(), AttentionInputs(q, k, v, Mask(segments)), interpret=True)

    with jax.set_mesh(mesh):
        actual = jax.jit(per_device(call, (spec, spec, spec, PartitionSpec(BATCH)), spec))(q, k, v, segments)
    np.testing.assert_allclose(actual, attention_reference(q, k, v, mask=Mask(segments)), atol=1e-5)
    assert len(actual.sharding.device_set) == 4


def test_unsupported_requests_have_a_reason(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")

    def reason(T, rate=0.0, key=None):
        spec = AttentionSpec(dropout=rate)
        return SPLASH.unsupported(make_request(spec, (1, T, 2, 64), (1, T, 2, 64), "bfloat16", Mask(), None, key))

    assert reason(1024) is None
    assert "1000 positions are no multiple of 128" in str(reason(1000))
    assert "dropout" in str(reason(1024, 0.1, jax.random.key(0)))
