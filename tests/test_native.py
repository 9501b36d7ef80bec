"""Kernels in C++: each against the plain reference beside it, values and gradients, and how their library is made."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.machine.native import build
from gptjax.machine.platform import plan_for_accelerator
from gptjax.ops import kernels
from gptjax.ops.attention import self_attention, split_heads
from gptjax.ops.attention_spec import AttentionSpec, Mask
from gptjax.ops.cross_entropy import LossOptions, cross_entropy, cross_entropy_reference
from gptjax.ops.elementwise import layer_norm_reference, layer_norm_with_residual
from gptjax.ops.linear import linear, linear_reference, mlp, mlp_reference
from gptjax.ops.plain_attention import attention_reference

DTYPES = ("bfloat16", "float32")
# Relative norms. bfloat16 keeps 8 bits, and results and gradients are rounded once or twice; float32 keeps 24, of sums
# of up to a thousand terms.
TOLERANCE = {"bfloat16": 8e-3, "float32": 2e-6}


@pytest.fixture
def need_kernels():
    if not build.ready():
        pytest.skip(build.state())


def need(dtype: str) -> None:
    if not build.ready() or (dtype == "float32" and not build.has_tiles()):
        pytest.skip(f"no kernels in {dtype}: {build.state()}")


def draw(*shape: int, dtype: str = "float32", scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def distance(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def same(dtype: str, fast, plain, *args: jax.Array) -> None:
    """Compares results and gradients; the reference gets the same numbers in float32."""
    wide = [arg.astype("float32") if arg.dtype == jnp.bfloat16 else arg for arg in args]
    y, derivative = jax.vjp(jax.jit(fast), *args)
    expected, expected_derivative = jax.vjp(plain, *wide)
    dy = draw(*y.shape, dtype=y.dtype)
    assert y.dtype == dy.dtype and distance(y, expected) < TOLERANCE[dtype]
    gradients = zip(derivative(dy), expected_derivative(dy.astype("float32")), strict=True)
    for number, (got, wanted) in enumerate(gradients):
        assert distance(got, wanted) < TOLERANCE[dtype], number
        assert got.dtype == args[number].dtype


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
            lambda x, w, b=None, out=out_dtype: linear(x, w, b, out, outputs_first),
            lambda x, w, b=None: linear_reference(x, w, b, "float32", outputs_first),
            *args,
        )
    same(
        dtype,
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
    same(dtype, mlp, mlp_reference, x, *weights, draw(rows, 64, scale=2.0))
    same(
        dtype,
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
        (2, 96, 2, 4, 32, 0, 4),  # two queries of a key head
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

    same(dtype, lambda qkv: self_attention(spec, qkv, mask), plain, draw(B, T, G, E, C, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "D", "V", "options"),
    [
        (2, 96, 64, 3001, LossOptions(2990)),
        (4, 64, 96, 1100, LossOptions(1100, label_smoothing=0.1, z_loss=1e-2)),
        (1, 32, 32, 2048, LossOptions(1500, label_smoothing=0.2)),  # a whole chunk of columns that are not real
        (130, 64, 32, 1030, LossOptions(1025)),  # three visits of rows
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

    loss, plain = value(cross_entropy)(x_BTD, w_VD), value(cross_entropy_reference)(*wide)
    assert loss.count == plain.count
    np.testing.assert_allclose(loss.nll, plain.nll, rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(loss.objective, plain.objective, rtol=TOLERANCE[dtype])
    again, gradients = objective(cross_entropy)(x_BTD, w_VD)
    assert again == loss.objective
    for got, wanted in zip(gradients, objective(cross_entropy_reference)(*wide)[1], strict=True):
        assert distance(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_norm_beside_the_stream(dtype, biased):
    need(dtype)
    x, scale, bias = 3.0 + draw(5, 30, 96), 1.0 + draw(96, scale=0.2), (draw(96),) * biased

    def both(norm):  # as a block has it: what is added to the stream, and what the norm gives
        def function(x, scale, bias=None):
            stream, y = norm(x, scale, bias)
            return 2.0 * stream + y.astype("float32") ** 2

        return function

    same(
        dtype,
        both(lambda *args: layer_norm_with_residual(*args, dtype)),
        both(lambda x, *args: (x, layer_norm_reference(x, *args, "float32"))),
        x,
        scale,
        *bias,
    )


def test_products_in_float32_are_as_exact_as_float32_is():
    need("float32")
    x, w = draw(64, 512), draw(512, 64)
    x = x * jnp.exp(draw(64, 1, scale=5.0))  # rows of all sizes
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)

    def error(y):
        return np.max(np.abs(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact, axis=1, keepdims=True))

    assert error(linear(x, w, None, "float32")) < 2 * error(linear_reference(x, w, None, "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype):
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


def test_kernels_are_left_alone_where_they_do_not_fit(need_kernels):
    assert kernels.usable("bfloat16", 32, 64)
    assert not kernels.usable("bfloat16", 32, 65)
    assert not kernels.usable("float16", 32, 64)
    with plan_for_accelerator():
        assert not kernels.usable("bfloat16", 32, 64)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert not kernels.usable("bfloat16", 32, 64)


def test_a_batch_of_calls_is_each_of_them(need_kernels):
    x, w = draw(2, 32, 64, dtype="bfloat16"), draw(64, 96)
    each = jnp.stack([linear(x[0], w, None, "float32"), linear(x[1], w, None, "float32")])
    assert (jax.vmap(lambda x: linear(x, w, None, "float32"))(x) == each).all()


def refused(call, *args) -> str:
    with pytest.raises(Exception, match=r"too little room|do not fit|not laid out") as error:
        jax.block_until_ready(jax.jit(call)(*args))
    return str(error.value)


X, X2, W, W_VD = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((64, 64), (64, 96), (64, 96), (1024, 64)))
TARGETS = jax.ShapeDtypeStruct((64,), "int32")
WITH_ROOM = {
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


@pytest.mark.parametrize("name", WITH_ROOM)
def test_a_kernel_refuses_too_little_room(name, monkeypatch, need_kernels):
    call, likes = WITH_ROOM[name]
    sizes = []
    jax.block_until_ready(jax.jit(call)(*zeros(likes)))
    whole = kernels._packed

    def less(x, size):
        sizes.append(size)
        return whole(
            x, {"weight_gradient": 31 * (64 + 96), "mlp_gradient": 3 * 64 * 96 + 127 * 320}.get(name, size - 1)
        )

    monkeypatch.setattr(kernels, "_packed", less)
    assert "too little room" in refused(lambda *args: call(*args), *zeros(likes)) and len(sizes) == 1


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("linear", lambda x, y: (x, y, kernels.NOTHING, kernels.NOTHING)),
        ("linear", lambda x, y: (x, x, jnp.ones(32), kernels.NOTHING)),
        ("weight_gradient", lambda x, y: (x, y[:32])),
        ("weight_gradient", lambda x, y: (x, y.astype("float32"))),
        ("mlp", lambda x, y: (x, x, kernels.NOTHING, y, kernels.NOTHING, kernels.NOTHING)),
        ("mlp_gradient", lambda x, y: (x, x, kernels.NOTHING, x, y)),
        ("layer_norm", lambda x, y: (x.astype("float32"), jnp.ones(32), kernels.NOTHING)),
        ("layer_norm_gradient", lambda x, y: (x.astype("float32"), jnp.ones(64), x, y.astype("float32"))),
        ("cross_entropy", lambda x, y: (x, x, jnp.zeros(32, "int32"))),
        (
            "cached_attention",
            lambda x, y: (jnp.ones((2, 2, 64)), *[x.reshape(1, 2, 32, 64)] * 2, jnp.ones((1, 32), bool)),
        ),
        ("few_rows", lambda x, y: (x.astype("float32"), y, kernels.NOTHING)),
    ],
)
def test_a_kernel_refuses_buffers_that_do_not_fit_one_another(name, args, need_kernels):
    like, vector, room = kernels._like, kernels._like((64,), "float32"), kernels._like((2**20,), "bfloat16")
    square, stream = like((64, 64), "bfloat16"), like((64, 64), "float32")
    out, options = {
        "linear": ((square, room), {"columns": False}),
        "weight_gradient": ((stream, vector, room), {}),
        "mlp": ((stream, room), {}),
        "mlp_gradient": ((square, stream, vector, stream, room), {}),
        "layer_norm": (square, {"epsilon": np.float32(1e-5)}),
        "layer_norm_gradient": ((stream, vector, vector), {"epsilon": np.float32(1e-5)}),
        "cross_entropy": ((vector, vector, vector, room), kernels._loss_numbers(64, 0.0, 0.0)),
        "cached_attention": (like((2, 2, 64), "float32"), {}),
        "few_rows": ((stream, square, vector), {}),
    }[name]
    refused(
        lambda x, y: kernels._call(name, out)(*args(x, y), **options),
        *(jnp.ones((64, n), "bfloat16") for n in (64, 96)),
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_attention_refuses_buffers_that_do_not_fit_one_another(gradient, need_kernels):
    qkv, logs = jnp.ones((2, 64, 2, 3, 32), "bfloat16"), jnp.ones((2, 2, 64))
    y = jnp.ones((2, 64, 2, 32), "bfloat16")
    short = jnp.zeros((1, 64), "int32")  # the documents of one row of two
    if gradient:
        assert "do not fit" in refused(lambda y: kernels.attention_gradient(qkv, None, y, logs, y, 0), y[:1])
        assert "do not fit" in refused(lambda s: kernels.attention_gradient(qkv, s, y, logs, y, 0), short)
    else:
        assert "do not fit" in refused(lambda s: kernels.attention(qkv, s, 0), short)


def test_a_damaged_library_is_made_again(tmp_path, need_kernels):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho new > "$2"\n')
    compiler.chmod(0o700)
    path = build._built(str(compiler), tmp_path / "compiled")
    assert path.read_text() == "new\n"
    path.write_text("damaged\n")
    assert build._built(str(compiler), tmp_path / "compiled") == path and path.read_text() == "new\n"
    path.with_name(f"{path.name}.xxh3").unlink()
    path.write_text("not signed\n")
    assert build._built(str(compiler), tmp_path / "compiled").read_text() == "new\n"


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from gptjax.machine.native import build, compiler
if len(sys.argv) > 2:
    compiler.OPTIONS = (*compiler.OPTIONS, *sys.argv[2:])
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
from gptjax.ops.linear import mlp, mlp_reference
from gptjax.ops.attention import self_attention, split_heads
from gptjax.ops.attention_spec import AttentionSpec
from gptjax.ops.plain_attention import attention_reference
x, w = (jax.random.normal(jax.random.key(n), (64, 64)) for n in range(2))
def same(fast, plain, *args):
    def both(function):  # value and gradients, compiled as a whole
        def run(*args):
            y, derivative = jax.vjp(function, *args)
            return y, *derivative(y)
        return jax.jit(run)
    for a, b in zip(both(fast)(*args), both(plain)(*(x.astype("float32") for x in args)), strict=True):
        assert jnp.linalg.norm((a.astype("float32") - b).ravel()) < 1e-2 * jnp.linalg.norm(b.ravel())
x = x.astype("bfloat16")
same(lambda x, w: mlp(x, w, None, w, None), lambda x, w: mlp_reference(x, w, None, w, None), x, w / 8)
qkv = jnp.stack([x[:, :32], x[:, 32:], x[:, :32]], axis=1).reshape(1, 64, 1, 3, 32)
same(lambda x: self_attention(AttentionSpec(), x), lambda x: attention_reference(*split_heads(x)), qkv)
print(build.state())
"""


def state_of(folder: Path, *options: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), *options]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()


def test_the_form_without_tiles(tmp_path, need_kernels):
    assert state_of(tmp_path, "-mno-amx-bf16", "-mno-amx-tile", "-mno-amx-int8") == "AVX-512, for bfloat16"


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        ((), {"GPTJAX_NATIVE": "0"}, "none: GPTJAX_NATIVE=0"),
        ((), {"PATH": "/nowhere", "CXX": ""}, "none: no C++ compiler was found"),
        (("-DXLA_FFI_API_C_API_H_", "-no-such-option"), {}, "none: they could not be compiled"),
    ],
)
def test_where_there_are_no_kernels_it_says_why_and_computes_without(
    tmp_path, need_kernels, options, environment, reason
):
    assert state_of(tmp_path, *options, **environment).startswith(reason)
    assert not list(tmp_path.glob("*.so"))
