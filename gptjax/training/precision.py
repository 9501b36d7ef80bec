"""Chooses the compute dtype of a machine; dynamic loss scale for float16, whose gradients would otherwise underflow
(arXiv:1710.03740, section 3.2)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from gptjax.machine.processor import multiplies_bfloat16

INITIAL_SCALE = 2.0**12
GROW_AFTER = 1000  # finite steps in a row before the scale doubles


def compute_dtype(
    chosen: Literal["auto", "float32", "bfloat16", "float16"],
) -> Literal["float32", "bfloat16", "float16"]:
    """Resolves "auto" for this machine; returns other values unchanged.

    A processor without such instructions takes 1.4 times as long in bfloat16 as in float32 (docs/performance.md).
    """
    if chosen != "auto":
        return chosen
    if jax.default_backend() == "cpu":
        return "bfloat16" if multiplies_bfloat16() else "float32"
    capability = getattr(jax.devices()[0], "compute_capability", "8.0")  # of an NVIDIA GPU; 8.0: Ampere
    return "bfloat16" if float(capability) >= 8.0 else "float32"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Factor of the loss before differentiation; a power of two, so that scaling rounds nothing."""

    scale: jax.Array
    good_steps: jax.Array


def init_loss_scale() -> LossScale:
    """Returns the scale to start from."""
    return LossScale(jnp.float32(INITIAL_SCALE), jnp.int32(0))


def next_loss_scale(old: LossScale, finite: jax.Array) -> LossScale:
    """Halves the scale after a step whose gradients overflowed, doubles it after `GROW_AFTER` that did not."""
    grow = finite & (old.good_steps + 1 >= GROW_AFTER)
    scale = jnp.where(grow, old.scale * 2.0, jnp.where(finite, old.scale, jnp.maximum(old.scale * 0.5, 1.0)))
    return LossScale(scale, jnp.where(finite & ~grow, old.good_steps + 1, 0))
