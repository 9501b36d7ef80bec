"""Compares every kernel of a loaded library with NumPy, in milliseconds.

Without this check, a compiler, processor or virtual machine that computes wrong numbers would be noticed only by a
worse model. The kernels are called without XLA (`direct.h`).

Shape suffixes as in `ops/kernels.py`.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
CODES = {
    np.dtype(bool): 1,
    np.dtype(np.int8): 2,
    np.dtype(np.int32): 4,
    np.dtype(np.int64): 5,
    FLOAT32: 11,
    BFLOAT16: 16,
}
"""The numbers that stand for dtypes in XLA's interface, xla/ffi/api/c_api.h."""
PLANES = {BFLOAT16: 1, FLOAT32: 3}
"""Number of bfloat16 terms that represent one value in a kernel."""
TOLERANCE = {BFLOAT16: 0.03, FLOAT32: 2e-5}
"""Allowed error, relative to a number's size plus the root mean square of its array, after several roundings."""
MESSAGE_BYTES = 256
NONE = np.zeros(0, np.float32)
Spec = tuple[tuple[int, ...], np.dtype]


class KernelError(RuntimeError):
    """A kernel rejected its arguments."""


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("dimensions", ctypes.c_int64 * 8),
        ("data", ctypes.c_void_p),
    )


class _Option(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("dtype", ctypes.c_int64), ("value", ctypes.c_void_p))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("arguments", "results", "options", "threads")),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("option", ctypes.POINTER(_Option)),
        ("message", ctypes.c_char_p),
        ("most_helpers", ctypes.c_int64),
    )


def call(
    library,
    name: str,
    arguments: Sequence[np.ndarray],
    results: Sequence[Spec],
    options: Mapping[str, np.generic] | None = None,
    threads: int = 1,
) -> list[np.ndarray]:
    """Calls a kernel of a `ctypes` library on `threads` threads; `results` gives the shapes and dtypes of its results.

    Raises:
        KernelError: The kernel rejects the arguments.
    """
    return call_and_count(library, name, arguments, results, options, threads)[0]


def call_and_count(
    library,
    name: str,
    arguments: Sequence[np.ndarray],
    results: Sequence[Spec],
    options: Mapping[str, np.generic] | None = None,
    threads: int = 1,
) -> tuple[list[np.ndarray], int]:
    """Like `call`; also returns how many threads helped with the largest piece of work."""
    arrays = [np.ascontiguousarray(argument) for argument in arguments]
    arrays += [np.zeros(shape, dtype) for shape, dtype in results]
    values = {key: np.array(value) for key, value in sorted((options or {}).items())}
    buffers = (_Buffer * len(arrays))(
        *(
            _Buffer(CODES[array.dtype], array.ndim, (ctypes.c_int64 * 8)(*array.shape), array.ctypes.data)
            for array in arrays
        )
    )
    option = (_Option * len(values))(
        *(_Option(key.encode(), CODES[value.dtype], value.ctypes.data) for key, value in values.items())
    )
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    described = _Call(
        len(arguments), len(results), len(values), threads, buffers, option, ctypes.cast(message, ctypes.c_char_p), 0
    )
    function = library.gptjax_call_directly
    function.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Call))
    kernel = ctypes.cast(library[f"gptjax_{name}"], ctypes.c_void_p)
    if function(kernel, ctypes.byref(described)):
        raise KernelError(f"{name}: {message.value.decode(errors='replace')}")
    return arrays[len(arguments) :], described.most_helpers


class Case(NamedTuple):
    """A call of a kernel, and the expected results."""

    name: str
    arguments: tuple[np.ndarray, ...]
    results: tuple[Spec, ...]
    """The last one is the workspace, if the kernel has one."""
    options: Mapping[str, np.generic]
    expected: tuple[np.ndarray, ...]
    """Expected values of the first results."""
    precision: np.dtype | float
    """Precision of the kernel's arithmetic (see `TOLERANCE`), or a tolerance."""

    @property
    def tolerance(self) -> float:
        return self.precision if isinstance(self.precision, float) else TOLERANCE[self.precision]


def wrong_kernel(library, float32: bool) -> str:
    """Describes the first kernel whose results differ from NumPy's; empty: all are right.

    Args:
        library: The loaded library.
        float32: Whether its float32 kernels are used.
    """
    for case in cases((BFLOAT16, FLOAT32) if float32 else (BFLOAT16,)):
        try:
            found = call(library, case.name, case.arguments, case.results, case.options)
        except KernelError as error:
            return str(error)
        for result, expected in zip(found, case.expected, strict=False):
            wrong = count_wrong(result, expected, case.tolerance)
            if wrong:
                return f"{case.name} of {case.arguments[0].dtype.name}: {wrong} of {expected.size:,} numbers are wrong"
    return ""


def count_wrong(found: np.ndarray, expected: np.ndarray, tolerance: float) -> int:
    """Counts the numbers that differ by more than `tolerance` allows; NaN counts as different."""
    found, expected = found.astype(np.float64).reshape(expected.shape), expected.astype(np.float64)
    allowed = tolerance * (np.abs(expected) + np.sqrt(np.mean(expected**2)))
    return int(np.sum(~(np.abs(found - expected) <= allowed)))


def cases(dtypes: Sequence[np.dtype]) -> Iterator[Case]:
    """Yields one or two calls of each kernel for each precision; kernels for decoding have their own dtypes."""
    for dtype in dtypes:
        yield from _linear(dtype)
        yield from _mlp(dtype)
        yield from _layer_norm(dtype)
        yield from _attention(dtype)
        yield from _cross_entropy(dtype)
    yield from _small_batch_matmul()
    yield from _cached_attention()


def _draw(*shape: int, dtype: np.dtype = FLOAT32, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(dtype)


def _wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


def _workspace(dtype: np.dtype, size: int) -> Spec:
    return (PLANES[dtype] * size,), BFLOAT16


def _linear(dtype: np.dtype) -> Iterator[Case]:
    N, K, F = 96, 64, 96
    x, w, bias, residual = _draw(N, K, dtype=dtype), _draw(K, F, scale=0.2), _draw(F), _draw(N, F)
    rounded = w.astype(dtype)
    y = _wide(x)[0] @ _wide(rounded)[0] + _wide(bias)[0]
    for columns in (False, True):
        weight = rounded.T if columns else rounded
        results = ((N, F), dtype), _workspace(dtype, K * F)
        yield Case("linear", (x, weight, bias, NONE), results, {"columns": np.bool_(columns)}, (y,), dtype)
    results = ((N, F), FLOAT32), _workspace(dtype, K * F)
    yield Case("linear", (x, rounded, bias, residual), results, {"columns": np.bool_(False)}, (y + residual,), dtype)
    dy = _draw(N, F, dtype=dtype)
    results = ((K, F), FLOAT32), ((F,), FLOAT32), _workspace(dtype, N * (K + F))
    wide_x, wide_dy = _wide(x, dy)
    yield Case("weight_gradient", (x, dy), results, {}, (wide_x.T @ wide_dy, wide_dy.sum(0)), dtype)


def _gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GELU in its tanh approximation, and its derivative."""
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    tanh = np.tanh(inner)
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + tanh), slope


def _mlp(dtype: np.dtype) -> Iterator[Case]:
    N, D, F = 160, 64, 96
    x, dy, residual = _draw(N, D, dtype=dtype), _draw(N, D, dtype=dtype, scale=0.5), _draw(N, D)
    w_in, w_out = _draw(D, F, scale=0.2).astype(dtype), _draw(D, F, scale=0.3).astype(dtype)
    b_in, b_out = _draw(F), _draw(D)
    wide_x, wide_dy, wide_in, wide_out = _wide(x, dy, w_in, w_out)
    hidden, slope = _gelu(wide_x @ wide_in + b_in)
    results = ((N, D), FLOAT32), _workspace(dtype, 2 * D * F)
    expected = hidden @ wide_out.T + b_out + residual
    yield Case("mlp", (x, w_in, b_in, w_out, b_out, residual), results, {}, (expected,), dtype)
    dh = wide_dy @ wide_out * slope
    weight = (D, F), FLOAT32
    workspace = _workspace(dtype, 3 * D * F + 2 * 256 * (D + F))
    results = ((N, D), dtype), weight, ((F,), FLOAT32), weight, workspace
    expected = dh @ wide_in.T, wide_x.T @ dh, dh.sum(0), wide_dy.T @ hidden
    yield Case("mlp_gradient", (x, w_in, b_in, w_out, dy), results, {}, expected, dtype)


def _layer_norm(dtype: np.dtype) -> Iterator[Case]:
    N, D, epsilon = 70, 96, 1e-5
    x, scale, bias, residual = 3 + _draw(N, D), 1 + _draw(D, scale=0.2), _draw(D), _draw(N, D)
    dy = _draw(N, D, dtype=dtype)
    wide = x.astype(np.float64)
    inverse = 1 / np.sqrt(wide.var(-1, keepdims=True) + epsilon)
    normed = (wide - wide.mean(-1, keepdims=True)) * inverse
    options = {"epsilon": np.float32(epsilon)}
    yield Case("layer_norm", (x, scale, bias), (((N, D), dtype),), options, (normed * scale + bias,), dtype)
    wide_dy = dy.astype(np.float64)
    scaled = wide_dy * scale
    along = (scaled * normed).mean(-1, keepdims=True)
    dx = (scaled - scaled.mean(-1, keepdims=True) - normed * along) * inverse + residual
    results = ((N, D), FLOAT32), ((D,), FLOAT32), ((D,), FLOAT32)
    expected = dx, (wide_dy * normed).sum(0), wide_dy.sum(0)
    yield Case("layer_norm_gradient", (x, scale, dy, residual), results, options, expected, dtype)


def _attention(dtype: np.dtype) -> Iterator[Case]:
    B, T, G, R, C, window = 2, 160, 1, 2, 32, 100
    qkv = _draw(B, T, G, R + 2, C, dtype=dtype)
    segments = np.sort(np.random.default_rng(0).integers(0, 2, (B, T)), axis=1).astype(np.int32)
    wide = qkv.astype(np.float64)
    q_BTRC, k_BTC, v_BTC = wide[:, :, 0, :R], wide[:, :, 0, R], wide[:, :, 0, R + 1]
    t = np.arange(T)
    visible_BTS = (t[:, None] >= t) & (t[:, None] - t < window) & (segments[:, :, None] == segments[:, None])
    scores_BRTS = np.einsum("btrc,bsc->brts", q_BTRC, k_BTC) / np.sqrt(C)
    scores_BRTS = np.where(visible_BTS[:, None], scores_BRTS, -np.inf)
    top_BRT1 = scores_BRTS.max(-1, keepdims=True)
    logs_BRT = np.log(np.exp(scores_BRTS - top_BRT1).sum(-1)) + top_BRT1[..., 0]
    weights_BRTS = np.exp(scores_BRTS - logs_BRT[..., None])
    y_BTRC = np.einsum("brts,bsc->btrc", weights_BRTS, v_BTC)
    options = {"window": np.int64(window)}
    results = ((B, T, R, C), dtype), ((B, R, T), FLOAT32)
    yield Case("attention", (qkv, segments), results, options, (y_BTRC, logs_BRT), dtype)

    y, dy = y_BTRC.astype(dtype), _draw(B, T, R, C, dtype=dtype)
    wide_y, wide_dy = _wide(y, dy)
    dweights_BRTS = np.einsum("btrc,bsc->brts", wide_dy, v_BTC)
    sums_BRT1 = np.einsum("btrc,btrc->brt", wide_dy, wide_y)[..., None]
    dscores_BRTS = weights_BRTS * (dweights_BRTS - sums_BRT1) / np.sqrt(C)
    dq_BTRC = np.einsum("brts,bsc->btrc", dscores_BRTS, k_BTC)
    dk_BTC = np.einsum("brts,btrc->bsc", dscores_BRTS, q_BTRC)
    dv_BTC = np.einsum("brts,btrc->bsc", weights_BRTS, wide_dy)
    expected = np.concatenate([dq_BTRC, dk_BTC[:, :, None], dv_BTC[:, :, None]], axis=2)[:, :, None]
    arguments = qkv, segments, y, logs_BRT.astype(np.float32), dy
    yield Case("attention_gradient", arguments, ((qkv.shape, dtype),), options, (expected,), dtype)


def _cross_entropy(dtype: np.dtype) -> Iterator[Case]:
    N, D, V, vocab_size, smoothing, z_loss = 96, 64, 1056, 1050, 0.1, 0.01
    x, w = _draw(N, D, dtype=dtype), _draw(V, D, scale=0.3).astype(dtype)
    targets = np.random.default_rng(1).integers(-1, vocab_size, N).astype(np.int32)
    wide_x, wide_w = _wide(x, w)
    logits = wide_x @ wide_w[:vocab_size].T
    top = logits.max(-1)
    log_z = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
    counts = targets >= 0
    at_target = np.where(counts, np.take_along_axis(logits, np.maximum(targets, 0)[:, None], 1)[:, 0], 0)
    expected = log_z, at_target, logits.sum(-1)
    options = {"vocab_size": np.int64(vocab_size), "smoothing": np.float32(smoothing), "z_loss": np.float32(z_loss)}
    parts, chunk = (((N,), FLOAT32),) * 3, 1024 * D
    yield Case("cross_entropy", (x, w, targets), (*parts, _workspace(dtype, chunk)), options, expected, dtype)
    dlogits = np.exp(logits - log_z[:, None]) * (1 + 2 * z_loss * log_z[:, None]) - smoothing / vocab_size
    dlogits[np.arange(N), np.maximum(targets, 0)] -= 1 - smoothing
    dlogits *= counts[:, None]
    dw = np.zeros((V, D))
    dw[:vocab_size] = dlogits.T @ wide_x
    workspace = _workspace(dtype, 2 * chunk + N * D + N * 1024)
    results = (*parts, ((N, D), FLOAT32), ((V, D), FLOAT32), workspace)
    expected = *expected, dlogits @ wide_w[:vocab_size], dw
    yield Case("cross_entropy_gradient", (x, w, targets), results, options, expected, dtype)


def _small_batch_matmul() -> Iterator[Case]:
    N, K, F = 19, 128, 64
    x, scale = _draw(N, K), 0.01 * np.abs(_draw(F))
    for dtype, w in (
        (BFLOAT16, _draw(F, K, dtype=BFLOAT16)),
        (np.dtype(np.int8), _draw(F, K, scale=40).clip(-127, 127)),
    ):
        w = w.astype(dtype)
        numbers = 4 // dtype.itemsize
        steps = K // (16 * numbers)
        packed = w.reshape(F // 32, 32, steps, 16, numbers).transpose(0, 2, 3, 1, 4)
        yield Case("pack_weights", (w,), ((packed.shape, dtype),), {}, (packed,), FLOAT32)
        rows = 32 if dtype == BFLOAT16 else 16
        read = x.astype(dtype) if dtype == BFLOAT16 else x
        wide_x, wide_w = _wide(read, w)
        y, vector = wide_x @ wide_w.T, NONE
        if dtype != BFLOAT16:
            y, vector = y * scale, scale
        results = ((N, F), FLOAT32), ((-(-N // rows), steps, 32, 16, numbers), dtype), ((N,), FLOAT32)
        # int8: rounding changes a number of a row by up to half of 1 / (127 * 254) of the row's largest number
        precision = FLOAT32 if dtype == BFLOAT16 else 3e-4
        yield Case("small_batch_matmul", (x, np.ascontiguousarray(packed), vector), results, {}, (y,), precision)


def _cached_attention() -> Iterator[Case]:
    B, G, R, S, C = 2, 2, 2, 37, 48
    q_BHC = _draw(B, G * R, C)
    visible_BS = np.random.default_rng(0).integers(0, 2, (B, S)).astype(bool)
    visible_BS[:, 5] = True
    for dtype in (FLOAT32, BFLOAT16):
        k_BGSC, v_BGSC = _draw(B, G, S, C, dtype=dtype), _draw(B, G, S, C + 1, dtype=dtype)[..., :C]
        wide_k, wide_v = (np.repeat(wide, R, axis=1) for wide in _wide(k_BGSC, v_BGSC))
        scores_BHS = np.einsum("bhc,bhsc->bhs", q_BHC.astype(np.float64), wide_k) / np.sqrt(C)
        weights_BHS = np.exp(scores_BHS - scores_BHS.max(-1, keepdims=True)) * visible_BS[:, None]
        y_BHC = np.einsum("bhs,bhsc->bhc", weights_BHS / weights_BHS.sum(-1, keepdims=True), wide_v)
        arguments = q_BHC, k_BGSC, v_BGSC, visible_BS
        yield Case("cached_attention", arguments, ((q_BHC.shape, FLOAT32),), {}, (y_BHC,), FLOAT32)
