"""How far a run's steps were from being called spikes: python bench/spikes.py RUN_DIR [...].

Goes through the steps that were logged as `gptjax/training/watch.py` goes through all of them, with its own constants:
of a run that logs every tenth step, "about the last 32 steps" are here 32 logged ones.
"""

import argparse
import math
from pathlib import Path

import jax.numpy as jnp

from gptjax.report.metrics import read_metrics
from gptjax.training.watch import (
    ACCEPTED,
    MIN_LOSS_DEVIATION,
    MIN_NORM_DEVIATION,
    READY,
    WINDOW,
    Watch,
    init_watch,
    update_watch,
)


def distances(watch: Watch, loss: float, norm: float) -> tuple[float, float]:
    """How many deviations a loss and a norm lie above their means."""
    loss_deviation = max(math.sqrt(watch.loss_variance), MIN_LOSS_DEVIATION)
    norm_deviation = max(math.sqrt(watch.norm_variance), MIN_NORM_DEVIATION * float(watch.norm_mean))
    return (loss - float(watch.loss_mean)) / loss_deviation, (norm - float(watch.norm_mean)) / norm_deviation


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="+")
    for run_dir in parser.parse_args().run_dir:
        watch, found = init_watch(), []
        rows = [row for row in read_metrics(run_dir) if "grad_norm" in row]
        for row in rows:
            loss, norm = row["loss"], row["grad_norm"]
            if row["step"] > READY and watch.accepted > 1:
                found.append((*distances(watch, loss, norm), row["step"]))
            watch = update_watch(
                watch, jnp.int32(ACCEPTED), jnp.bool(True), jnp.float32(loss), jnp.float32(norm), jnp.float32(1)
            )
        by_loss, by_norm = max(found), max(found, key=lambda item: item[1])
        print(f"{run_dir}: {len(rows)} logged steps of {rows[-1]['step']}, {len(found)} of them judged")
        print(f"  loss at most {by_loss[0]:.1f} deviations above the mean of about {WINDOW}, at step {by_loss[2]}")
        print(f"  gradient norm at most {by_norm[1]:.1f} deviations, at step {by_norm[2]}")


if __name__ == "__main__":
    main()
