"""The learning rate at each update."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config.optim import EXTENSION, OptimConfig

Schedule = Callable[[jax.Array], jax.Array]
"""The learning rate as a function of the number of updates made before: a float32 scalar."""


def make_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """Returns the learning rate of a run of `num_steps`, with the changes of this number that `config.extended` lists.

    Warm-up is linear. cosine: SGDR without restarts (arXiv:1608.03983); wsd: warm-up, stable, decay (arXiv:2404.06395,
    section 4); inverse_sqrt: as the first transformers (arXiv:1706.03762, equation 3), with another peak.
    """
    changes = [match.groups() for match in map(EXTENSION.fullmatch, config.extended) if match]
    lengths = [*(int(planned) for _, _, planned in changes), num_steps]
    schedule = _warmed_up(config, 0, lengths[0], lambda n: jnp.zeros(()))
    for (how, update, _), length in zip(changes, lengths[1:], strict=True):
        after = _warmed_up if how == "restart" else _continued
        schedule = _switched(schedule, int(update), after(config, int(update), length, schedule))
    return schedule


def _switched(before: Schedule, update: int, after: Schedule) -> Schedule:
    return lambda updates: jnp.where(updates < update, before(updates), after(updates))


def _warmed_up(config: OptimConfig, first: int, num_steps: int, before: Schedule) -> Schedule:
    """Linear warm-up from the rate of `before` at update `first` to the peak, then decay until `num_steps`."""
    warmup = config.warmup_steps or math.ceil(config.warmup_fraction * (num_steps - first))
    peak, end = config.learning_rate, first + warmup
    steps = float(max(1, warmup) if config.warmup_rule == "to_peak" else warmup + 1)
    decay = _decay(config, end, num_steps, first + steps)

    def schedule(updates: jax.Array) -> jax.Array:
        n, start = updates.astype(jnp.float32), before(jnp.int32(first))
        warm = start + (peak - start) * (n - first + 1.0) / steps
        return jnp.where(n < end, warm, decay(n, jnp.float32(peak)))

    return schedule


def _continued(config: OptimConfig, first: int, num_steps: int, before: Schedule) -> Schedule:
    """Decay until `num_steps` from the rate that `before` has at update `first`."""
    decay = _decay(config, first, num_steps, first + 1.0)
    return lambda updates: decay(updates.astype(jnp.float32), before(jnp.int32(first)))


def _decay(
    config: OptimConfig, first: int, num_steps: int, peak_step: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns `rate(n, start)`: from `start` at update `first` or later to `min_learning_rate` at `num_steps`.

    inverse_sqrt has `start` at step `peak_step`, where update n is step n + 1.
    """
    begin = first
    if config.schedule == "wsd":
        begin = max(first, num_steps - round(config.wsd_decay_fraction * num_steps))

    def rate(n: jax.Array, start: jax.Array) -> jax.Array:
        done = jnp.clip((n - begin) / max(1, num_steps - begin), 0.0, 1.0)
        return DECAYS[config.schedule](Point(n, done, start, config.min_learning_rate, peak_step))

    return rate


class Point(NamedTuple):
    """A moment of a decay."""

    update: jax.Array
    """float32 number of updates made before."""
    done: jax.Array
    """Share of the decay that is over, in [0, 1]."""
    start: jax.Array
    """Learning rate where the decay begins."""
    least: float
    """Learning rate where it ends."""
    peak_step: float
    """Step of the rate `start`."""


def _linear(at: Point) -> jax.Array:
    return at.start + at.done * (at.least - at.start)


DECAYS: dict[str, Callable[[Point], jax.Array]] = {
    "cosine": lambda at: at.least + 0.5 * (1.0 + jnp.cos(jnp.pi * at.done)) * (at.start - at.least),
    "linear": _linear,
    "wsd": _linear,
    "inverse_sqrt": lambda at: at.start * jnp.sqrt(at.peak_step / (at.update + 1.0)),
    "constant": lambda at: at.start,
}
"""The learning rate after warm-up, by `optim.schedule`."""
