"""Decides on the device, as part of the step, which steps make no update: gradients that are not finite, and spikes.

A spike is a loss or a gradient norm more than `sigma` standard deviations above the running mean of accepted steps.
Mean and variance are exponential moving averages over about `WINDOW` steps. Nothing is a spike before `READY` steps
were accepted; by then the averages no longer contain the falling loss of the first steps. In a steady run the deviation
becomes so small that harmless steps would be outliers, so it counts as at least `MIN_LOSS_DEVIATION` nats, or
`MIN_NORM_DEVIATION` of the mean norm.
"""

import dataclasses

import jax
import jax.numpy as jnp

WINDOW = 32  # steps
READY = 128  # steps
MIN_LOSS_DEVIATION = 0.05  # nats
MIN_NORM_DEVIATION = 0.2  # of the mean
ACCEPTED, NOT_FINITE, LOSS_SPIKE, NORM_SPIKE, HALTED = range(5)
REASONS = {
    NOT_FINITE: "the gradient is not finite",
    LOSS_SPIKE: "the loss is a spike",
    NORM_SPIKE: "the gradient norm is a spike",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watch:
    """Running statistics of accepted steps, and the number of consecutive steps that were not accepted. Scalars."""

    accepted: jax.Array
    loss_mean: jax.Array
    loss_variance: jax.Array
    norm_mean: jax.Array
    norm_variance: jax.Array
    in_a_row: jax.Array


def init_watch() -> Watch:
    """Returns the statistics before the first step."""
    zero = jnp.float32(0.0)
    return Watch(jnp.int32(0), zero, zero, zero, zero, jnp.int32(0))


def judge(watch: Watch, sigma: float, limit: int, loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns `ACCEPTED`, or the reason why a step makes no update, int32.

    After `limit` consecutive steps without an update the verdict stays `HALTED`. So the state is that of the last
    accepted step when the host, which runs behind, stops the run.

    Args:
        watch: Statistics before this step.
        sigma: Threshold of a spike, in standard deviations above the mean; 0: no spikes.
        limit: Number of consecutive steps without an update that ends a run.
        loss: Nats per target.
        norm: Norm of the whole gradient.
    """
    verdict = jnp.int32(ACCEPTED)
    if sigma:
        ready = watch.accepted >= READY
        norm_deviation = jnp.maximum(jnp.sqrt(watch.norm_variance), MIN_NORM_DEVIATION * watch.norm_mean)
        loss_deviation = jnp.maximum(jnp.sqrt(watch.loss_variance), MIN_LOSS_DEVIATION)
        verdict = jnp.where(ready & (norm > watch.norm_mean + sigma * norm_deviation), NORM_SPIKE, verdict)
        verdict = jnp.where(ready & (loss > watch.loss_mean + sigma * loss_deviation), LOSS_SPIKE, verdict)
    verdict = jnp.where(jnp.isfinite(norm) & jnp.isfinite(loss), verdict, NOT_FINITE)
    return jnp.where(watch.in_a_row >= limit, HALTED, verdict).astype(jnp.int32)


def update_watch(
    watch: Watch, verdict: jax.Array, counts: jax.Array, loss: jax.Array, norm: jax.Array, targets: jax.Array
) -> Watch:
    """Updates the statistics with an accepted step that had targets, and the count of rejected steps.

    Args:
        watch: Statistics before the step.
        verdict: Verdict on the step.
        counts: Whether a rejected step increases `in_a_row`; false for a float16 overflow that only lowers the loss
            scale.
        loss: Loss of the step.
        norm: Gradient norm of the step.
        targets: Number of targets of the step.
    """
    take = (verdict == ACCEPTED) & (targets > 0)
    share = 1.0 / jnp.minimum(watch.accepted + 1, WINDOW).astype(jnp.float32)

    def moments(mean, variance, value):
        difference = value - mean
        new = mean + share * difference, (1.0 - share) * (variance + share * difference**2)
        return jnp.where(take, new[0], mean), jnp.where(take, new[1], variance)

    return Watch(
        watch.accepted + take,
        *moments(watch.loss_mean, watch.loss_variance, loss),
        *moments(watch.norm_mean, watch.norm_variance, norm),
        jnp.where(verdict == ACCEPTED, 0, watch.in_a_row + counts),
    )
