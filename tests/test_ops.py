"""Every fast path against its plain reference: values and gradients, float32 and bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.machine.platform import plan_for_accelerator
from gptjax.ops import attention as attention_module
from gptjax.ops import cudnn_attention
from gptjax.ops.attention import attention
from gptjax.ops.attention_heads import AttentionInputs
from gptjax.ops.attention_spec import AttentionSpec, Mask, make_request
from gptjax.ops.blocked_attention import ALIASING, FUSED_ROWS
from gptjax.ops.cross_entropy import (
    LossOptions,
    cross_entropy,
    cross_entropy_reference,
)
from gptjax.ops.elementwise import (
    NORM_EPSILON,
    dropout,
    gelu,
    gelu_reference,
    layer_norm,
    layer_norm_reference,
)
from gptjax.ops.embedding import embedding, sum_by_token, sum_by_token_reference
from gptjax.ops.matmul import matmul, matmul_reference
from gptjax.ops.plain_attention import attention_reference
from gptjax.ops.scheduling import deterministic_ops_requested
from gptjax.ops.triton_attention import triton_attention

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# Relative to the largest value: float32 sums in another order; bfloat16 has 8 bits and is rounded several times.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
DTYPES = ["float32", "bfloat16"]


def normal(seed: int, *shape: int, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    """Traces the programs of both platforms, on any platform."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    if request.param == "gpu":
        monkeypatch.setattr("gptjax.ops.scheduling.LARGE", 1)
    return request.param


def assert_same(fast, reference, arguments, dtype, cotangent_seed=9):
    """Compares values and gradients of two functions of some arrays."""
    out = jax.eval_shape(reference, *arguments)
    cotangent = normal(cotangent_seed, *out.shape, dtype=out.dtype)

    @functools.partial(jax.jit, static_argnums=0)  # one compilation instead of one for each operation
    def value_and_gradients(function, arguments, cotangent):
        value, vjp = jax.vjp(function, *arguments)
        return value, *vjp(cotangent)

    actual, expected = (value_and_gradients(function, arguments, cotangent) for function in (fast, reference))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, atol=TOLERANCE[dtype] * np.abs(e).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs_first", [False, True])
def test_matmul(dtype, outputs_first):
    x, w = normal(0, 2, 5, 24, dtype=dtype), normal(1, 24, 40)
    w = w.T if outputs_first else w
    fast = functools.partial(matmul, out_dtype=jnp.float32, outputs_first=outputs_first)
    assert_same(lambda x, w: fast(x, w), lambda x, w: matmul_reference(x, w, jnp.float32, outputs_first), (x, w), dtype)


def test_matmul_keeps_the_weight_gradient_in_full_precision():
    x, w = normal(0, 256, 16, dtype="bfloat16"), normal(1, 16, 32)
    dw = jax.grad(lambda w: jnp.sum(matmul(x, w, jnp.bfloat16).astype(jnp.float32)))(w)
    exact = np.asarray(x, np.float64).sum(axis=0)
    np.testing.assert_allclose(dw, np.broadcast_to(exact[:, None], w.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm(dtype, biased, backend):
    arguments = (normal(0, 3, 7, 32), 1.0 + 0.1 * normal(1, 32), *([normal(2, 32)] if biased else []))

    def with_bias(function):
        return lambda x, scale, bias=None: function(x, scale, bias, jnp.dtype(dtype))

    assert_same(with_bias(layer_norm), with_bias(layer_norm_reference), arguments, dtype)


# Partial blocks, whole blocks, and more rows than jaxlib 0.10.2 sums correctly in a fusion with a matmul.
@pytest.mark.parametrize("rows", [FUSED_ROWS - 1, FUSED_ROWS, 33_000])
def test_layer_norm_with_more_rows_than_jaxlib_sums_correctly(rows):
    x, dy, scale, bias = normal(0, rows, 8), normal(1, rows, 8), 1.0 + 0.1 * normal(2, 8), normal(3, 8)
    y, pull = jax.vjp(jax.jit(lambda *arrays: layer_norm(*arrays, jnp.float32)), x, scale, bias)

    x, dy, scale, bias = (np.asarray(array, np.float64) for array in (x, dy, scale, bias))
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + NORM_EPSILON)
    normed, dnormed = (x - x.mean(axis=-1, keepdims=True)) / deviation, dy * scale
    along = normed * (dnormed * normed).mean(axis=-1, keepdims=True)
    dx = (dnormed - dnormed.mean(axis=-1, keepdims=True) - along) / deviation
    expected = (normed * scale + bias, dx, (dy * normed).sum(axis=0), dy.sum(axis=0))
    # Float32 sums; the last two are over many rows.
    for actual, exact in zip((y, *pull(jnp.asarray(dy, jnp.float32))), expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype, backend):
    # Only up to 4: beyond it the reference's own derivative has an error of 4e-6.
    assert_same(gelu, gelu_reference, (normal(0, 4, 64, dtype=dtype),), dtype)


def test_gelu_has_float32_accuracy_for_every_input():
    x = np.concatenate([np.linspace(-8, 8, 100_001), [-1e4, -100, -1e-20, 0, 1e-20, 100, 1e4]]).astype(np.float32)
    y, pull = jax.vjp(gelu, jnp.asarray(x))
    (slope,) = pull(jnp.ones_like(y))

    x64 = x.astype(np.float64)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x64 + 0.044715 * x64**3))
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x64**2)
    # A few roundings of numbers of the size of x, and of 1.
    np.testing.assert_allclose(y, 0.5 * x64 * (1 + tanh), rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(slope, 0.5 * (1 + tanh) + 0.5 * x64 * (1 - tanh**2) * inner, rtol=0, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [50, 3000])  # a one-hot matmul; a scatter, or ordered sums
def test_embedding(vocabulary, backend, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", DETERMINISTIC)
    tokens = jax.random.randint(jax.random.key(1), (3, 20), 0, vocabulary)

    def one_hot_product(w):
        return jnp.einsum("btv,vd->btd", jax.nn.one_hot(tokens, vocabulary), w, precision="highest")

    assert_same(lambda w: embedding(w, tokens), one_hot_product, (normal(0, vocabulary, 8),), "float32")


# Every token once; all equal; tokens that span several tiles; a last tile that is not full.
@pytest.mark.parametrize(("rows", "tokens"), [(300, None), (300, 1), (1000, 5), (128, 40), (1, 1)])
def test_sum_by_token(rows, tokens):
    ids = jax.random.permutation(jax.random.key(0), rows) if tokens is None else jnp.arange(rows) % tokens
    x = normal(1, rows, 8)
    actual, expected = (jax.jit(f, static_argnums=0)(1024, ids, x) for f in (sum_by_token, sum_by_token_reference))
    np.testing.assert_allclose(actual, expected, atol=1e-4)  # float32 sums of up to 300 normal numbers


@pytest.mark.parametrize(
    ("length", "kv_heads", "dtype", "segmented", "window"),
    [
        *((300, 2, "float32", *mask) for mask in ((False, 0), (True, 0), (False, 100), (True, 3))),
        *((5, 2, "float32", False, 0), (5, 2, "float32", True, 3)),  # less than a block; then one block
        *((128, 1, "bfloat16", True, 0), (128, 1, "bfloat16", False, 100), (128, 4, "float32", True, 3)),
        *((300, 4, "float32", False, 100), (300, 4, "float32", True, 3), (300, 1, "float32", True, 3)),
        *((300, 2, "bfloat16", False, 0), (300, 2, "bfloat16", True, 3)),
    ],
)
def test_attention(length, kv_heads, dtype, segmented, window):
    assert_attention_is_plain(2, length, kv_heads, dtype, segmented, window)


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "segmented", "window"),
    [("float32", 4, False, 0), ("float32", 2, True, 3), ("bfloat16", 2, False, 0), ("bfloat16", 4, True, 3)],
)
def test_attention_with_enough_rows_for_fused_matmuls(dtype, kv_heads, segmented, window):
    assert FUSED_ROWS == 8 * 4 * 128
    assert_attention_is_plain(8, 300, kv_heads, dtype, segmented, window)


@pytest.mark.parametrize("window", [0, 100])
def test_attention_with_a_power_of_two_length(window):
    assert_attention_is_plain(1, ALIASING, 2, "float32", False, window)


@pytest.mark.parametrize("spec", [AttentionSpec(window=50, sinks=3), AttentionSpec(stride=40, summary=4)], ids=str)
def test_sparse_attention_in_blocks_is_plain(spec):
    """Three blocks of queries; positions start again in the second document."""
    q, k, v = (normal(i, 2, 300, n, 8) for i, n in enumerate((4, 2, 2)))
    segments = jnp.broadcast_to(jnp.arange(300)[None] >= 170, (2, 300)).astype(jnp.int32)
    mask = Mask(segments, positions_BT=jnp.arange(300)[None] - 170 * segments)
    assert_same(
        lambda q, k, v: attention(q, k, v, spec, mask),
        lambda q, k, v: attention_reference(q, k, v, spec, mask),
        (q, k, v),
        "float32",
    )


def assert_attention_is_plain(B, length, kv_heads, dtype, segmented, window):
    H, C = 4, 8
    q, k, v = (normal(i, B, length, n, C, dtype=dtype) for i, n in enumerate((H, kv_heads, kv_heads)))
    segments = None
    if segmented:
        segments = jnp.cumsum(jax.random.bernoulli(jax.random.key(5), 0.03, (B, length)), axis=1)
    assert_same(
        lambda q, k, v: attention(q, k, v, AttentionSpec(window=window), Mask(segments)),
        lambda q, k, v: attention_reference(q, k, v, AttentionSpec(window=window), Mask(segments)),
        (q, k, v),
        dtype,
    )


def test_attention_dropout_has_its_rate_and_preserves_the_mean():
    B, T, H, C = 2, 300, 2, 4
    q, v = jnp.zeros((B, T, H, C)), jnp.ones((B, T, H, C))
    plain = jax.jit(attention)(q, q, v)
    keys = jax.random.split(jax.random.key(0), 32)
    dropped = jax.jit(jax.vmap(lambda key: attention(q, q, v, AttentionSpec(dropout=0.25), key=key)))(keys)
    np.testing.assert_allclose(plain, 1.0, rtol=1e-6)
    # The weights of position t are equal, so its output is a mean over t + 1 draws; the last positions are close to 1.
    np.testing.assert_allclose(jnp.mean(dropped, axis=(0, 1, 3, 4))[-50:], 1.0, atol=0.02)
    np.testing.assert_allclose(jnp.mean(dropped[..., 0, :, :] == 0), 0.25, atol=0.1)


@pytest.mark.parametrize("B", [1, FUSED_ROWS // (2 * 128)])
def test_attention_dropout_uses_the_same_mask_in_the_backward_pass(B):
    T, H, C = 300, 2, 4
    q, k, v = (normal(i, B, T, H, C) for i in range(3))
    key = jax.random.key(3)

    @jax.jit
    def loss(v):
        return jnp.sum(attention(q, k, v, AttentionSpec(dropout=0.5), key=key) ** 2)

    direction = normal(7, B, T, H, C)
    # The loss is quadratic in v, so a central difference only has rounding errors, about 1e-7 * loss / step.
    numeric = (loss(v + 0.1 * direction) - loss(v - 0.1 * direction)) / 0.2
    np.testing.assert_allclose(jnp.sum(jax.grad(loss)(v) * direction), numeric, rtol=1e-3)


def test_a_window_reduces_the_flops_of_attention():
    def flops(window):
        x = jax.ShapeDtypeStruct((1, 1024, 2, 16), jnp.float32)
        return (
            jax.jit(lambda q: attention(q, q, q, AttentionSpec(window=window)))
            .lower(x)
            .compile()
            .cost_analysis()["flops"]
        )

    assert flops(128) < 0.5 * flops(0)


def test_attention_memory_grows_linearly():
    def temporary_bytes(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        grad = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v)), argnums=(0, 1, 2))
        return jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(512), temporary_bytes(2048)
    assert long < 8 * short, (short, long)  # 4 for a linear growth, 16 for a quadratic one


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_pass_stores_only_the_inputs_of_a_layer(dtype):
    N, D, layers = 1024, 768, 8

    def loss(x_ND, w_LDD):
        for layer in range(layers):
            normed_ND = layer_norm(x_ND, jnp.ones(D), None, jnp.dtype(dtype))
            hidden_ND = gelu(matmul(normed_ND, w_LDD[layer], normed_ND.dtype))
            x_ND = x_ND + matmul(hidden_ND, w_LDD[layer], jnp.float32)
        return jnp.sum(x_ND)

    x_ND = normal(0, N, D)
    compiled = jax.jit(jax.grad(loss)).lower(x_ND, normal(1, layers, D, D)).compile()
    # The inputs of the norm and of GELU. With their outputs, or with cast weights, it would be twice as much.
    kept = layers * (x_ND.nbytes + N * D * jnp.dtype(dtype).itemsize)
    assert kept < compiled.memory_analysis().temp_size_in_bytes < 1.2 * kept


def test_attention_on_a_gpu_falls_back_without_cudnn(monkeypatch, capsys):
    q = normal(0, 1, 16, 2, 8, dtype="bfloat16")
    expected = attention_reference(q, q, q)
    cudnn_attention.cudnn_works.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(attention(q, q, q), expected)
    assert "cuDNN attention is not available" in capsys.readouterr().out
    cudnn_attention.cudnn_works.cache_clear()


@pytest.mark.parametrize(("segmented", "window"), [(False, 0), (True, 5)])
def test_attention_on_a_gpu_calls_cudnn_with_equal_arguments_while_tracing(segmented, window, monkeypatch, capsys):
    asked = []

    def in_place_of_cudnn(*arrays, implementation, **options):
        asked.append(implementation)
        return jax_attention(*arrays, implementation="xla", **options)

    jax_attention = jax.nn.dot_product_attention
    arrays = normal(0, 2, 16, 4, 8, dtype="bfloat16"), *(normal(i, 2, 16, 2, 8, dtype="bfloat16") for i in (1, 2))
    segments = jnp.broadcast_to(jnp.arange(16) // 6, (2, 16)) if segmented else None
    cudnn_attention.cudnn_works.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_place_of_cudnn)
    forms = (
        lambda *x, form=form: form(*x, AttentionSpec(window=window), Mask(segments))
        for form in (attention, attention_reference)
    )
    assert_same(*forms, arrays, "bfloat16")
    assert set(asked) == {"cudnn"} and not capsys.readouterr().out
    cudnn_attention.cudnn_works.cache_clear()


@pytest.mark.parametrize("flag", [DETERMINISTIC, "--a=b --xla_gpu_exclude_nondeterministic_ops"])
def test_attention_on_a_gpu_with_deterministic_operations(flag, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", flag)

    def chosen(T, window=0, rate=0.0, key=None):
        shapes = (1, T, 2, 64), (1, T, 2, 64)
        spec = AttentionSpec(window=window, dropout=rate)
        return attention_module.choose(make_request(spec, *shapes, "bfloat16", Mask(), None, key))

    name, reasons = chosen(1024)[0].name, chosen(1024)[1]
    assert name == "Triton" and "deterministic" in reasons["cuDNN"]
    assert chosen(1000)[0].name == chosen(1024, 100)[0].name == "blocked"
    assert chosen(1024, 0, 0.1, jax.random.key(0))[0].name == "blocked"
    assert chosen(100)[0].name == "plain"


@pytest.mark.parametrize("flag", ["", "--xla_gpu_deterministic_ops=false", "--xla_gpu_deterministic_ops_of_mine"])
def test_other_flags_do_not_request_deterministic_operations(flag, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flag)
    assert not deterministic_ops_requested()


@pytest.mark.parametrize(("kv_heads", "segmented"), [(4, False), (2, True)])
def test_triton_attention_in_interpret_mode(kv_heads, segmented):
    arrays = normal(0, 1, 256, 4, 16), *(normal(i, 1, 256, kv_heads, 16) for i in (1, 2))
    segments = jnp.arange(256)[None] // 100 if segmented else None
    mask = Mask(segments)

    def fast(q, k, v):
        return triton_attention(AttentionSpec(), AttentionInputs(q, k, v, mask), interpret=True)

    assert_same(fast, lambda q, k, v: attention_reference(q, k, v, mask=mask), arrays, "float32")


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {}), *((dtype, {"label_smoothing": 0.1, "z_loss": 0.01}) for dtype in DTYPES)],
)
@pytest.mark.parametrize("chunk_logits", [2**26, 400])  # one chunk, and several
def test_cross_entropy(dtype, options, chunk_logits, backend, monkeypatch):
    monkeypatch.setattr("gptjax.ops.cross_entropy.CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr("gptjax.ops.cross_entropy.DEVICE_CHUNK_LOGITS", chunk_logits)
    loss_options = LossOptions(vocab_size=29, **options)
    x, w = normal(0, 2, 12, 16, dtype=dtype), normal(1, 32, 16)
    targets = jax.random.randint(jax.random.key(2), (2, 12), 0, 29).at[0, :5].set(-1)

    def objective(function):
        return lambda x, w: function(loss_options, x, w, targets).objective

    assert_same(objective(cross_entropy), objective(cross_entropy_reference), (x, w), dtype)
    actual, expected = (
        jax.jit(lambda x, w, f=f: f(loss_options, x, w, targets))(x, w)  # a new function, so that it is traced again
        for f in (cross_entropy, cross_entropy_reference)
    )
    np.testing.assert_allclose(actual.nll, expected.nll, rtol=1e-5)
    assert actual.count == expected.count == 19


def test_a_plan_uses_the_chunk_size_of_accelerators(monkeypatch):
    monkeypatch.setattr("gptjax.ops.cross_entropy.CHUNK_LOGITS", 400)

    def loops():
        def loss(x, w):
            return cross_entropy(LossOptions(29), x, w, jnp.zeros((2, 12), jnp.int32)).objective

        return str(jax.make_jaxpr(loss)(normal(0, 2, 12, 16), normal(1, 32, 16))).count("scan[")

    assert loops() == 1
    with plan_for_accelerator():
        assert loops() == 0
    assert loops() == 1


def test_cross_entropy_without_targets_is_zero():
    x, w = normal(0, 1, 4, 8), normal(1, 16, 8)
    loss, grads = jax.jit(
        jax.value_and_grad(
            lambda x, w: cross_entropy(LossOptions(16), x, w, jnp.full((1, 4), -1)).objective, argnums=(0, 1)
        )
    )(x, w)
    assert loss == 0 and not any(jnp.any(g) for g in grads)


def test_dropout_keeps_the_mean_and_does_nothing_without_a_key():
    x = jnp.ones((400, 400))
    y = dropout(x, 0.3, jax.random.key(0))
    np.testing.assert_allclose(jnp.mean(y == 0), 0.3, atol=0.01)
    np.testing.assert_allclose(jnp.mean(y), 1.0, atol=0.01)
    assert dropout(x, 0.3, None) is x
