"""Checks XLA's results before a run relies on them. (`machine/native/check.py` checks the C++ kernels.)

On CPUs jaxlib 0.10.2 returns wrong numbers for a matmul without batch dimensions whose result is summed in the same
fusion, if it has more than 32,768 rows (github.com/jax-ml/jax/issues/39103). Compiling without such fusions avoids the
bug and costs speed, so only an affected program is compiled that way. Matmuls with batch dimensions, the only ones in
attention on a CPU, are not affected; `check` tests that.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.errors import UserError
from gptjax.ops.attention import attention

ROWS = 32769
SEQUENCES, LENGTH = 2049, 16  # more than 32,768 rows in attention, too
SAFE_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def check() -> None:
    """Compares small programs, with matmuls like those of attention, with NumPy; takes milliseconds.

    Raises:
        UserError: The results differ.
    """
    numbers = np.arange(ROWS * 4, dtype=np.float32) % 8
    x_BNC = numbers.reshape(-1, 1, 4)
    weights_BNS = x_BNC[:, :, ::-1]
    eye_BSC = np.broadcast_to(np.eye(4, dtype=np.float32), (ROWS, 4, 4))
    _compare(jax.jit(_weighted)(x_BNC, eye_BSC, weights_BNS), (x_BNC * weights_BNS).sum(-1), 0.0)
    if jax.default_backend() == "cpu":
        arrays = np.random.default_rng(0).normal(size=(4, SEQUENCES, LENGTH, 1, 4)).astype(np.float32)
        found, expected = jax.jit(_attended)(*arrays), _attended_numpy(*arrays[:, :, :, 0])
        for a, e in zip(found, expected, strict=True):
            _compare(a[:, :, 0], e, 1e-3)  # rounding errors are 1e-6, wrong rows are off by their size


def _compare(found: jax.Array, expected: np.ndarray, tolerance: float) -> None:
    wrong = int(np.sum(~(np.abs(np.asarray(found) - expected) <= tolerance)))  # NaN is wrong too
    if wrong:
        raise UserError(
            f"this jaxlib computes wrong numbers on {jax.devices()[0].device_kind}: {wrong} of {expected.size:,} in its"
            " self-test; install another jaxlib"
        )


def compile_safely(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program; without certain fusions, if it is affected by this jaxlib's bug."""
    program = lowered.compile()
    if jax.default_backend() == "cpu" and has_fusion_bug() and is_affected(program.as_text() or ""):
        return lowered.compile(SAFE_OPTIONS)
    return program


def has_fusion_bug(options: dict[str, str | bool] | None = None) -> bool:
    """Whether this jaxlib, with these compiler options, miscompiles the smallest program that shows the bug."""
    x_RC = np.zeros((ROWS, 3), np.float32)
    x_RC[:, 0] = np.arange(ROWS)
    program = jax.jit(_squared_lengths).lower(x_RC, np.eye(3, dtype=np.float32)).compile(options)
    return bool(np.any(np.asarray(program(x_RC, np.eye(3, dtype=np.float32))) != x_RC[:, 0] ** 2))


def is_affected(program: str) -> bool:
    """Whether the text of a compiled program contains a fusion of the kind that jaxlib 0.10.2 miscompiles."""
    fused = set(re.findall(r"calls=%?([\w.\-]+)[^\n]*__ynn_fusion", program))
    for computation in re.split(r"\n(?=\S)", program):
        name = computation.lstrip("%").partition(" ")[0]
        if name in fused and " reduce(" in computation:
            dots = [line for line in computation.splitlines() if " dot(" in line]
            if any("lhs_batch_dims" not in line for line in dots):
                return True
    return False


def _weighted(x_BNC: jax.Array, other_BSC: jax.Array, weights_BNS: jax.Array) -> jax.Array:
    logits_BNS = jnp.einsum("bnc,bsc->bns", x_BNC, other_BSC, preferred_element_type=jnp.float32)
    return jnp.sum(logits_BNS * weights_BNS, axis=-1)


def _squared_lengths(x_RC: jax.Array, matrix_CC: jax.Array) -> jax.Array:
    return jax.vmap(lambda row_C: jnp.sum((matrix_CC @ row_C) ** 2))(x_RC)


def _attended(q_BTHC: jax.Array, k_BTHC: jax.Array, v_BTHC: jax.Array, dy_BTHC: jax.Array) -> tuple[jax.Array, ...]:
    """Attention and its gradients, computed by JAX."""
    y_BTHC, pull = jax.vjp(attention, q_BTHC, k_BTHC, v_BTHC)
    return y_BTHC, *pull(dy_BTHC)


def _attended_numpy(q_BTC: np.ndarray, k_BTC: np.ndarray, v_BTC: np.ndarray, dy_BTC: np.ndarray) -> tuple:
    """Attention and its gradients for one head, computed by NumPy."""
    scale = q_BTC.shape[-1] ** -0.5
    scores = q_BTC @ k_BTC.swapaxes(1, 2) * scale + np.triu(np.full((LENGTH, LENGTH), -1e30, np.float32), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = dy_BTC @ v_BTC.swapaxes(1, 2)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    return weights @ v_BTC, dscores @ k_BTC, dscores.swapaxes(1, 2) @ q_BTC, weights.swapaxes(1, 2) @ dy_BTC
