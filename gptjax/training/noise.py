"""The gradient noise scale: the batch size above which more sequences per step save few steps.

Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1. The squared norm of a gradient over B sequences has the
mean |G|^2 + tr(S) / B. The norms at two batch sizes, micro-batch and batch, give unbiased estimates of |G|^2 and of
tr(S), the sum of the variances of a single sequence's gradient. Their quotient is the noise scale. Both estimates are
averaged over about `WINDOW` steps before they are divided, because each is very noisy.
"""

import dataclasses

import jax
import jax.numpy as jnp

WINDOW = 50  # steps
SMALL_SQUARE = "small_square"
"""Name, among the extras of a loss, of the sum over micro-batches of their gradients' squared norms."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """Exponential moving averages, from zero; both are too small by the same factor. Scalars."""

    square: jax.Array
    """Of the estimates of |G|^2."""
    trace: jax.Array
    """Of the estimates of tr(S), for one sequence."""

    @property
    def scale(self) -> jax.Array:
        """The noise scale, in sequences; not a number while the estimate of |G|^2 is not positive."""
        return jnp.where(self.square > 0, self.trace / self.square, jnp.nan)


def init_noise() -> Noise:
    """Returns the averages before the first step."""
    return Noise(jnp.float32(0.0), jnp.float32(0.0))


def update_noise(
    noise: Noise, accepted: jax.Array, small: jax.Array, large: jax.Array, sizes: tuple[int, int]
) -> Noise:
    """Adds the estimates of a step, if its gradient was accepted.

    Args:
        noise: Averages before the step.
        accepted: Whether the step made an update.
        small: Mean squared norm of the gradients of micro-batches.
        large: Squared norm of the gradient of the batch.
        sizes: Sequences of a micro-batch and of the batch, in this order.
    """
    b, B = sizes
    square = (B * large - b * small) / (B - b)
    trace = (small - large) / (1 / b - 1 / B)

    def add(mean: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(accepted, mean + (value - mean) / WINDOW, mean)

    return Noise(add(noise.square, square), add(noise.trace, trace))
