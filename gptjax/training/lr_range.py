"""The learning-rate range test (arXiv:1506.01186, section 3.3): the rate rises exponentially from step to step, and the
loss tells which rates train.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.parallel.mesh import traced_in
from gptjax.parallel.rules import shardings
from gptjax.training.setup import build
from gptjax.training.step import init_state, make_train_step
from gptjax.training.trainer import device_batches

SMOOTHING = 0.9
"""Decay of the running mean of the losses."""
DIVERGED = 1.5
"""The test ends where the smoothed loss is this many times the lowest one."""


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """The result of a range test."""

    steepest: float
    """Rate at which the smoothed loss falls fastest per step."""
    lowest: float
    """Rate at which the smoothed loss is lowest."""
    diverged: float | None
    """Rate at which the test ended, because the loss rose; None: it did not."""

    @property
    def rate(self) -> float:
        """The suggestion: a third of the rate with the lowest loss, which is near the largest one that trains."""
        return float(f"{self.lowest / 3:.2g}")


def rates_of(low: float, high: float, steps: int) -> list[float]:
    """Rates of the steps, evenly spaced in their logarithm."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def measure(config: Config, run_dir: Path, low: float, high: float, steps: int) -> tuple[list[float], list[float]]:
    """Trains from the config's start with rising rates until the loss rises; returns the rates and losses of its steps.

    Args:
        config: A run; its schedule, spike rule and number of steps are not used.
        run_dir: An empty folder for what a run writes.
        low: First rate.
        high: Last rate.
        steps: At least 2.

    Raises:
        UserError: The config or its data cannot be used, or the task has no loss to minimise.
    """
    if config.task.kind == "reinforce":
        raise UserError("task.kind=reinforce: lr-find needs a loss that falls, and this task raises a reward")
    train = dataclasses.replace(
        config.train, num_steps=steps, num_epochs=0.0, spike_sigma=0.0, max_skipped_in_a_row=steps
    )
    parts, state, _ = build(dataclasses.replace(config, run_dir=str(run_dir), train=train), run_dir)
    ratio = math.log(high / low) / (steps - 1)
    step = make_train_step(parts.config, lambda updates: low * jnp.exp(ratio * updates.astype(jnp.float32)))
    where = shardings(parts.mesh, jax.eval_shape(lambda: init_state(parts.config)))
    program = jax.jit(traced_in(parts.mesh, step), donate_argnums=0, out_shardings=(where, None))
    rates, losses, smooth, lowest = rates_of(low, high, steps), [], 0.0, math.inf
    batches = device_batches(parts, 0, steps)
    try:
        for number, batch in enumerate(batches, 1):
            state, metrics = program(state, batch)
            losses.append(float(metrics["loss"]))
            smooth = SMOOTHING * smooth + (1 - SMOOTHING) * losses[-1]
            mean = smooth / (1 - SMOOTHING**number)
            if not math.isfinite(losses[-1]) or mean > DIVERGED * lowest:
                break
            lowest = min(lowest, mean)
    finally:
        batches.close()
        parts.checkpoints.close()
    return rates[: len(losses)], losses


def suggest(rates: Sequence[float], losses: Sequence[float], steps: int) -> Suggestion:
    """Reads the curve of a range test that was planned for `steps`.

    Raises:
        UserError: The loss did not fall, so no rate can be suggested.
    """
    means, smooth = [], 0.0
    for number, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            break
        smooth = SMOOTHING * smooth + (1 - SMOOTHING) * loss
        means.append(smooth / (1 - SMOOTHING**number))
    falls = [means[n - 1] - means[n + 1] for n in range(1, len(means) - 1)]
    if not falls or max(falls) <= 0 or min(means) > 0.99 * means[0]:
        raise UserError(
            f"the loss did not fall between the rates {rates[0]:.1e} and {rates[-1]:.1e}; widen --low and --high,"
            " or give more --steps"
        )
    return Suggestion(
        steepest=rates[1 + falls.index(max(falls))],
        lowest=rates[means.index(min(means))],
        diverged=rates[-1] if len(losses) < steps or len(means) < len(losses) else None,
    )
