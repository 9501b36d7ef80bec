"""Which steps make no update: gradients that are not finite, and spikes. All of it on the device, as part of the step.

A spike is a loss or a gradient norm that lies more than `sigma` standard deviations above the running mean of the steps
that were accepted. Mean and variance forget exponentially, over about `WINDOW` steps, and nothing is called a spike
before `READY` were accepted: by then the fall of the first steps is forgotten. A steady run has a tiny deviation, so
that harmless steps would lie far outside of it: deviations count for at least `MIN_LOSS_DEVIATION` nats and
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
    """Running statistics of accepted steps, and how many steps in a row were not accepted. Scalars."""

    accepted: jax.Array
    loss_mean: jax.Array
    loss_variance: jax.Array
    norm_mean: jax.Array
    norm_variance: jax.Array
    in_a_row: jax.Array


def init_watch() -> Watch:
    """Returns what stands before the first step."""
    zero = jnp.float32(0.0)
    return Watch(jnp.int32(0), zero, zero, zero, zero, jnp.int32(0))


def judge(watch: Watch, sigma: float, limit: int, loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns `ACCEPTED` or why a step makes no update, int32.

    After `limit` steps in a row without an update the verdict stays `HALTED`, so that the state is that of the last
    accepted step whenever the host looks.

    Args:
        watch: Before this step.
        sigma: Deviations above the mean that make a spike; 0: none does.
        limit: Steps in a row without an update that end a run.
        loss: Nats per target.
        norm: Of the whole gradient.
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


def next_watch(
    watch: Watch, verdict: jax.Array, counts: jax.Array, loss: jax.Array, norm: jax.Array, targets: jax.Array
) -> Watch:
    """Takes an accepted step into the statistics, if it had targets.

    Args:
        watch: Before the step.
        verdict: Of the step.
        counts: Whether a step that is not accepted counts as one in a row; a float16 step that only finds its scale
            does not.
        loss: Of the step.
        norm: Of the step.
        targets: How many targets the loss is the mean of.
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
