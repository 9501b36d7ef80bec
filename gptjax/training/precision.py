"""A dynamic loss scale for float16, whose gradients would underflow (arXiv:1710.03740, section 3.2)."""

import dataclasses

import jax
import jax.numpy as jnp

INITIAL_SCALE = 2.0**12
GROW_AFTER = 1000  # finite steps in a row before the scale doubles


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
