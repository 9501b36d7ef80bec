"""Kernels in C++: each against the plain reference beside it, values and gradients. Every comparison also holds that
the kernels were called, so that no test passes by comparing the reference with itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.machine.platform import plan_for_accelerator
from gptjax.ops import kernel_attention, kernels
from gptjax.ops.attention import self_attention, split_heads
from gptjax.ops.attention_spec import AttentionSpec, Mask
from gptjax.ops.cross_entropy import LossOptions, cross_entropy, cross_entropy_reference
from gptjax.ops.elementwise import layer_norm_reference, layer_norm_with_residual
from gptjax.ops.linear import linear, linear_reference, mlp, mlp_reference
from gptjax.ops.plain_attention import attention_reference
from tests.native.kernels import TOLERANCE, assert_close, kernels_of, need

DTYPES = ("bfloat16", "float32")


@pytest.fixture
def need_kernels():
    need()


def draw(*shape: int, dtype: str = "float32", scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def same(dtype: str, used: set[str], fast, plain, *args: jax.Array) -> None:
    """Compares results, gradients, and which kernels compute them. The reference gets the same numbers in float32."""
    out_dtype = jax.eval_shape(fast, *args).dtype

    def with_gradients(function):
        def run(*args):
            y, derivative = jax.vjp(function, *args)
            return y, *derivative(draw(*y.shape, dtype=out_dtype).astype(y.dtype))

        return run

    assert kernels_of(with_gradients(fast), *args) == used
    wide = [arg.astype("float32") if arg.dtype == jnp.bfloat16 else arg for arg in args]
    found, expected = jax.jit(with_gradients(fast))(*args), jax.jit(with_gradients(plain))(*wide)
    for got, wanted in zip(found, expected, strict=True):
        assert_close(got, wanted, dtype)
    assert [gradient.dtype for gradient in found[1:]] == [arg.dtype for arg in args]


def test_a_few_wrong_numbers_are_detected():
    expected = draw(1000, 1000)
    assert_close(expected, expected, "bfloat16")
    for wrong in (expected.at[77, 16:32].set(0.0), expected.at[3, 3].set(jnp.nan)):
        with pytest.raises(AssertionError):
            assert_close(wrong, expected, "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs_first", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer(dtype, outputs_first, biased):
    need(dtype)
    x, w = draw(3, 352, 64, dtype=dtype), draw(*((96, 64) if outputs_first else (64, 96)), scale=0.2)
    args = (x, w.astype(dtype), draw(96)) if biased else (x, w.astype(dtype))
    assert kernels.usable(dtype, 3 * 352, 64, 96)
    for out_dtype in {dtype, "float32"}:
        same(
            dtype,
            {"linear", "weight_gradient"},
            lambda x, w, b=None, out=out_dtype: linear(x, w, b, out, outputs_first),
            lambda x, w, b=None: linear_reference(x, w, b, "float32", outputs_first),
            *args,
        )
    same(
        dtype,
        {"linear", "weight_gradient"},
        lambda x, w, onto: linear(x, w, None, "float32", outputs_first, onto),
        lambda x, w, onto: linear_reference(x, w, None, "float32", outputs_first, onto),
        *args[:2],
        draw(3, 352, 96),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [32, 1184])  # 1,184: two passes of a weight's gradient, the last one short
def test_an_mlp(dtype, rows):
    need(dtype)
    x, w_in, w_out = draw(rows, 64, dtype=dtype), draw(64, 160, scale=0.2), draw(64, 160, scale=0.3)
    weights = (w_in.astype(dtype), draw(160), w_out.astype(dtype), draw(64))
    same(dtype, {"mlp", "mlp_gradient"}, mlp, mlp_reference, x, *weights, draw(rows, 64, scale=2.0))
    same(
        dtype,
        {"mlp", "mlp_gradient"},
        lambda x, w_in, w_out: mlp(x, w_in, None, w_out, None),
        lambda x, w_in, w_out: mlp_reference(x, w_in, None, w_out, None),
        x,
        weights[0],
        weights[2],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "G", "E", "C", "window", "documents"),
    [
        (2, 256, 3, 3, 64, 0, 1),
        (1, 32, 2, 3, 32, 0, 1),
        (2, 96, 2, 4, 32, 0, 4),  # two query heads per key head
        (1, 352, 2, 3, 64, 50, 1),
        (2, 160, 1, 5, 96, 33, 3),
    ],
)
def test_attention(dtype, B, T, G, E, C, window, documents):
    need(dtype)
    segments_BT = None
    if documents > 1:
        segments_BT = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, documents, (B, T))), jnp.int32)

    spec, mask = AttentionSpec(window=window), Mask(segments_BT)

    def plain(qkv_BTGEC):
        q_BTHC, k_BTGC, v_BTGC = split_heads(qkv_BTGEC)
        return attention_reference(q_BTHC, k_BTGC, v_BTGC, spec, mask)

    qkv_BTGEC = draw(B, T, G, E, C, dtype=dtype)
    used = {"attention", "attention_gradient"}
    same(dtype, used, lambda qkv: self_attention(spec, qkv, mask), plain, qkv_BTGEC)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "D", "V", "options"),
    [
        (2, 96, 64, 3001, LossOptions(2990)),
        (4, 64, 96, 1100, LossOptions(1100, label_smoothing=0.1, z_loss=1e-2)),
        (1, 32, 32, 2048, LossOptions(1500, label_smoothing=0.2)),  # a whole chunk of padding columns
        (130, 64, 32, 1030, LossOptions(1025)),  # three chunks of rows
    ],
)
def test_the_loss_over_a_large_vocabulary(dtype, B, T, D, V, options):
    need(dtype)
    x_BTD, w_VD = draw(B, T, D, dtype=dtype), draw(V, D, scale=0.3).astype(dtype)
    targets_BT = jnp.asarray(np.random.default_rng(1).integers(-1, options.vocab_size, (B, T)), jnp.int32)
    wide = x_BTD.astype("float32"), w_VD.astype("float32")

    def value(function):
        return jax.jit(lambda x, w: function(options, x, w, targets_BT))

    def objective(function):
        return jax.jit(jax.value_and_grad(lambda x, w: function(options, x, w, targets_BT).objective, argnums=(0, 1)))

    assert kernels_of(value(cross_entropy), x_BTD, w_VD) == {"cross_entropy"}
    assert kernels_of(objective(cross_entropy), x_BTD, w_VD) == {"cross_entropy_gradient"}
    loss, plain = value(cross_entropy)(x_BTD, w_VD), value(cross_entropy_reference)(*wide)
    assert loss.count == plain.count
    np.testing.assert_allclose(loss.nll, plain.nll, rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(loss.objective, plain.objective, rtol=TOLERANCE[dtype])
    again, gradients = objective(cross_entropy)(x_BTD, w_VD)
    assert again == loss.objective
    for got, wanted in zip(gradients, objective(cross_entropy_reference)(*wide)[1], strict=True):
        assert_close(got, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm_with_residual(dtype, biased):
    need(dtype)
    x, scale, bias = 3.0 + draw(5, 30, 96), 1.0 + draw(96, scale=0.2), (draw(96),) * biased

    def both(norm):  # as in a block: the residual stream, and the output of the norm
        def function(x, scale, bias=None):
            stream, y = norm(x, scale, bias)
            return 2.0 * stream + y.astype("float32") ** 2

        return function

    same(
        dtype,
        {"layer_norm", "layer_norm_gradient"},
        both(lambda *args: layer_norm_with_residual(*args, dtype)),
        both(lambda x, *args: (x, layer_norm_reference(x, *args, "float32"))),
        x,
        scale,
        *bias,
    )


def test_float32_matmuls_have_float32_accuracy():
    need("float32")
    x, w = draw(64, 512), draw(512, 64)
    x = x * jnp.exp(draw(64, 1, scale=5.0))  # rows of very different sizes
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)

    def error(y):
        return np.max(np.abs(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact, axis=1, keepdims=True))

    assert error(linear(x, w, None, "float32")) < 2 * error(linear_reference(x, w, None, "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_propagate(dtype):
    need(dtype)
    x, qkv = draw(64, 64, dtype=dtype).at[3, 5].set(jnp.nan), draw(1, 32, 1, 3, 32, dtype=dtype)
    w, biases = draw(64, 64).astype(dtype), (jnp.zeros(64), jnp.zeros(64))
    for y in (linear(x, w, None, dtype), mlp(x, w, biases[0], w, biases[1])):
        assert jnp.isnan(y[3]).all() and jnp.isfinite(y.at[3].set(0)).all()
    for number, kind in enumerate(("query", "key", "value")):
        y = self_attention(AttentionSpec(), qkv.at[0, 7, 0, number, 2].set(jnp.inf))
        assert not jnp.isfinite(y[0, 7:]).all(), kind
    hidden, table, targets = draw(1, 64, 64, dtype=dtype), draw(1056, 64).astype(dtype), jnp.zeros((1, 64), jnp.int32)
    assert jnp.isnan(cross_entropy(LossOptions(1056), hidden.at[0, 9].set(jnp.nan), table, targets).nll)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others_and_bits_stay_the_same(dtype):
    need(dtype)
    x, w = draw(512, 64, dtype=dtype), draw(64, 128).astype(dtype)
    y = mlp(x, w, None, w, None)
    assert (y[320:352] == mlp(x[320:352], w, None, w, None)).all()
    qkv, dy = draw(2, 128, 4, 3, 32, dtype=dtype), draw(2, 128, 4, 32, dtype=dtype)
    first, again = (jax.vjp(lambda qkv: self_attention(AttentionSpec(), qkv), qkv)[1](dy)[0] for _ in range(2))
    assert (first == again).all()


def test_kernels_are_not_used_for_unsupported_sizes(need_kernels):
    assert kernels.usable("bfloat16", 32, 64)
    assert not kernels.usable("bfloat16", 32, 65)
    assert not kernels.usable("float16", 32, 64)
    with plan_for_accelerator():
        assert not kernels.usable("bfloat16", 32, 64)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert not kernels.usable("bfloat16", 32, 64)


def test_a_vmapped_call_equals_separate_calls(need_kernels):
    x, w = draw(2, 32, 64, dtype="bfloat16"), draw(64, 96)
    each = jnp.stack([linear(x[0], w, None, "float32"), linear(x[1], w, None, "float32")])
    assert (jax.vmap(lambda x: linear(x, w, None, "float32"))(x) == each).all()


def refused(call, *args) -> str:
    with pytest.raises(Exception, match=r"too small|do not fit|not packed|multiples") as error:
        jax.block_until_ready(jax.jit(call)(*args))
    return str(error.value)


X, X2, W, W_VD = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((64, 64), (64, 96), (64, 96), (1024, 64)))
TARGETS = jax.ShapeDtypeStruct((64,), "int32")
WITH_WORKSPACE = {
    "linear": (lambda x, w: kernels.linear(x, w, None, x.dtype, False), (X, W)),
    "weight_gradient": (kernels.weight_gradient, (X, X2)),
    "mlp": (lambda x, w: kernels.mlp(x, w, None, w, None), (X, W)),
    "mlp_gradient": (lambda x, w: kernels.mlp_gradient(x, w, None, w, x), (X, W)),
    "cross_entropy": (lambda x, w, y: kernels.cross_entropy(x, w, y, 1024, 0.0, 0.0), (X, W_VD, TARGETS)),
    "cross_entropy_gradient": (
        lambda x, w, y: kernels.cross_entropy_gradient(x, w, y, 1024, 0.0, 0.0),
        (X, W_VD, TARGETS),
    ),
}


def zeros(like):
    return [jnp.zeros(x.shape, x.dtype) for x in like]


@pytest.mark.parametrize("name", WITH_WORKSPACE)
def test_a_kernel_rejects_a_small_workspace(name, monkeypatch, need_kernels):
    call, likes = WITH_WORKSPACE[name]
    sizes = []
    jax.block_until_ready(jax.jit(call)(*zeros(likes)))
    whole = kernels._packed

    def less(x, size):
        sizes.append(size)
        return whole(
            x, {"weight_gradient": 31 * (64 + 96), "mlp_gradient": 3 * 64 * 96 + 127 * 320}.get(name, size - 1)
        )

    monkeypatch.setattr(kernels, "_packed", less)
    assert "too small" in refused(lambda *args: call(*args), *zeros(likes)) and len(sizes) == 1


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("linear", lambda x, y: (x, y, kernels.NO_VECTOR, kernels.NO_VECTOR)),
        ("linear", lambda x, y: (x, x, jnp.ones(32), kernels.NO_VECTOR)),
        ("weight_gradient", lambda x, y: (x, y[:32])),
        ("weight_gradient", lambda x, y: (x, y.astype("float32"))),
        ("mlp", lambda x, y: (x, x, kernels.NO_VECTOR, y, kernels.NO_VECTOR, kernels.NO_VECTOR)),
        ("mlp_gradient", lambda x, y: (x, x, kernels.NO_VECTOR, x, y)),
        ("layer_norm", lambda x, y: (x.astype("float32"), jnp.ones(32), kernels.NO_VECTOR)),
        ("layer_norm_gradient", lambda x, y: (x.astype("float32"), jnp.ones(64), x, y.astype("float32"))),
        ("cross_entropy", lambda x, y: (x, x, jnp.zeros(32, "int32"))),
        (
            "cached_attention",
            lambda x, y: (jnp.ones((2, 2, 64)), *[x.reshape(1, 2, 32, 64)] * 2, jnp.ones((1, 32), bool)),
        ),
        (
            "cached_attention",  # keys with three axes
            lambda x, y: (jnp.ones((1, 2, 64)), *[x.reshape(1, 64, 64)] * 2, jnp.ones((1, 32), bool)),
        ),
        (
            "cached_attention",  # another number of channels
            lambda x, y: (jnp.ones((1, 2, 32)), *[x.reshape(1, 2, 32, 64)] * 2, jnp.ones((1, 32), bool)),
        ),
        ("pack_weights", lambda x, y: (x.reshape(-1),)),
        ("pack_weights", lambda x, y: (x[:0],)),
        ("small_batch_matmul", lambda x, y: (x.astype("float32"), y, kernels.NO_VECTOR)),
    ],
)
def test_a_kernel_rejects_buffers_with_mismatched_shapes(name, args, need_kernels):
    like, vector, room = kernels._shape, kernels._shape((64,), "float32"), kernels._shape((2**20,), "bfloat16")
    square, stream = like((64, 64), "bfloat16"), like((64, 64), "float32")
    out, options = {
        "linear": ((square, room), {"columns": False}),
        "weight_gradient": ((stream, vector, room), {}),
        "mlp": ((stream, room), {}),
        "mlp_gradient": ((square, stream, vector, stream, room), {}),
        "layer_norm": (square, {"epsilon": np.float32(1e-5)}),
        "layer_norm_gradient": ((stream, vector, vector), {"epsilon": np.float32(1e-5)}),
        "cross_entropy": ((vector, vector, vector, room), kernels._loss_attributes(64, 0.0, 0.0)),
        "cached_attention": (like((2, 2, 64), "float32"), {}),
        "pack_weights": (square, {}),
        "small_batch_matmul": ((stream, square, vector), {}),
    }[name]
    refused(
        lambda x, y: kernels._call(name, out)(*args(x, y), **options),
        *(jnp.ones((64, n), "bfloat16") for n in (64, 96)),
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_attention_rejects_buffers_with_mismatched_shapes(gradient, need_kernels):
    qkv, logs = jnp.ones((2, 64, 2, 3, 32), "bfloat16"), jnp.ones((2, 2, 64))
    y = jnp.ones((2, 64, 2, 32), "bfloat16")
    short = jnp.zeros((1, 64), "int32")  # documents of one sequence; the batch has two
    if gradient:
        assert "do not fit" in refused(lambda y: kernels.attention_gradient(qkv, None, y, logs, y, 0), y[:1])
        assert "do not fit" in refused(lambda s: kernels.attention_gradient(qkv, s, y, logs, y, 0), short)
    else:
        assert "do not fit" in refused(lambda s: kernels.attention(qkv, s, 0), short)


@pytest.mark.parametrize(("cores", "used"), [(2, True), (16, True), (64, False)])
def test_xla_computes_attention_if_most_cores_would_be_idle(cores, used, monkeypatch, need_kernels):
    monkeypatch.setattr(kernel_attention, "core_count", lambda: cores)
    qkv_BTGEC = draw(3, 32, 4, 3, 32, dtype="bfloat16")  # 12 pairs of a sequence and a key head
    assert bool(kernels_of(lambda qkv: self_attention(AttentionSpec(), qkv), qkv_BTGEC)) == used
