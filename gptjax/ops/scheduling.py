"""Controls the order and fusion of operations where XLA's own choice is slow or takes too much memory."""

import os
import re

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops.axes import sharded_by_compiler

LARGE = 2**19
"""Smallest array, in elements, for which results are recomputed in the backward pass instead of stored."""


def schedule_after(x: jax.Array, earlier: jax.Array | None) -> jax.Array:
    """Returns `x`, and makes XLA compute it after `earlier`; without `earlier` it returns `x` unchanged.

    XLA removes an optimization barrier before it schedules. It does not remove a multiplication by zero, because zero
    times NaN is NaN. If the first element of `earlier` is not finite, `x` therefore becomes NaN.
    """
    if earlier is None:
        return x
    first = earlier[(slice(0, 1),) * earlier.ndim].reshape((1,) * x.ndim)
    return x + (first * 0).astype(x.dtype)


def schedule_each_after(x: jax.Array, earlier: jax.Array) -> jax.Array:
    """Like `schedule_after`, element by element for two arrays of one shape, so that sharded arrays need no
    communication.

    Only a CPU needs it: on other platforms XLA computes both arrays in one kernel.
    """
    if target_platform() != "cpu":
        return x
    finite = jnp.where(jnp.isfinite(earlier), earlier, 0.0)  # times zero would be NaN otherwise
    return x + (finite * jnp.zeros((), earlier.dtype)).astype(x.dtype)


def optimization_barrier(*arrays: jax.Array, on: tuple[str, ...] = ("cpu",)) -> tuple[jax.Array, ...]:
    """Returns the arrays behind a barrier, so that XLA does not merge computations on them with equal ones elsewhere.

    XLA:CPU would store common subexpressions of two results, and could then pass neither result to its library as a
    whole. Other platforms usually benefit from sharing, so the barrier exists only on those that `on` names.
    """
    return jax.lax.optimization_barrier(arrays) if target_platform() in on else arrays


def recompute_in_backward(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns `x`, and makes XLA compute what the backward pass derives from it only after `gradient` is known.

    Otherwise XLA finds the same computation in the forward pass and stores its result until then, which wastes memory,
    and on a GPU also time. Small arrays are returned unchanged. So are sharded arrays on a CPU, because all devices
    would need the first element of `gradient`.
    """
    if x.size < LARGE:
        return x
    if target_platform() != "cpu":
        return jax.lax.optimization_barrier((x, gradient))[0]
    return x if sharded_by_compiler() else schedule_after(x, gradient)


def deterministic_ops_requested() -> bool:
    """Whether `XLA_FLAGS` ask for deterministic results on a GPU, with either of XLA's two flags for it."""
    flag = r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?(\s|$)"
    return re.search(flag, os.environ.get("XLA_FLAGS", "")) is not None
