"""What comes first, and what is computed on its own, where XLA would choose otherwise."""

import os
import re

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops.axes import compiler_cuts

LARGE = 2**19
"""Elements of an array of which results are computed a second time rather than kept in memory."""


def schedule_after(x: jax.Array, earlier: jax.Array | None) -> jax.Array:
    """Returns `x`, not computed before `earlier` is; None holds nothing back.

    A barrier would be gone before XLA orders its work. A product with zero stays, since zero times NaN is NaN: so where
    the first element of `earlier` is not finite, `x` is not either.
    """
    if earlier is None:
        return x
    first = earlier[(slice(0, 1),) * earlier.ndim].reshape((1,) * x.ndim)
    return x + (first * 0).astype(x.dtype)


def schedule_each_after(x: jax.Array, earlier: jax.Array) -> jax.Array:
    """The same for each element of two arrays of one shape, so that arrays cut over devices need not talk.

    Only a CPU needs it: elsewhere XLA writes both arrays from one kernel.
    """
    if target_platform() != "cpu":
        return x
    finite = jnp.where(jnp.isfinite(earlier), earlier, 0.0)  # times zero would be NaN otherwise
    return x + (finite * jnp.zeros((), earlier.dtype)).astype(x.dtype)


def optimization_barrier(*arrays: jax.Array, on: tuple[str, ...] = ("cpu",)) -> tuple[jax.Array, ...]:
    """Returns the arrays, so that what is computed of them shares nothing with what is computed elsewhere.

    XLA:CPU would find equal parts of two results, keep them in memory for both, and give neither to its library whole.
    On the other platforms (`on` names those where it is done) sharing is what is wanted, mostly.
    """
    return jax.lax.optimization_barrier(arrays) if target_platform() in on else arrays


def recompute_in_backward(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns `x` for a backward pass that comes with `gradient`, so that what it makes of `x` is made there.

    XLA would find that the forward pass made the same, and keep it until then: a waste of memory, and on a GPU of time.
    A CPU is faster with what it kept, so there it is done for much alone; and not where the compiler cuts arrays over
    devices, since all would need the first element.
    """
    if x.size < LARGE:
        return x
    if target_platform() != "cpu":
        return jax.lax.optimization_barrier((x, gradient))[0]
    return x if compiler_cuts() else schedule_after(x, gradient)


def deterministic_ops_requested() -> bool:
    """Whether `XLA_FLAGS` ask a GPU for the same bits each time, by either of XLA's two flags for it."""
    flag = r"--xla_gpu_(deterministic_ops|exclude_nondeterministic_ops)(=(true|1))?(\s|$)"
    return re.search(flag, os.environ.get("XLA_FLAGS", "")) is not None
