"""What checkpoints cost a run: python bench/checkpoint.py [--preset FILE.yaml] [--pairs 5] [--seconds 30].

Trains on random tokens for about `seconds`, in turn without a save and with one at the beginning, which is written
while training goes on. Says for each pair how long the loop stood still, how much longer the steps took than without a
save, and the processor time of all threads that are not the loop's. The first save also pays for memory that later ones
find at hand, and does not count.
"""

import argparse
import dataclasses
import math
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from gptjax.batches.pretraining import Batch
from gptjax.checkpoints.checkpoint import Checkpoints
from gptjax.config.reader import load_config
from gptjax.config.run import Config
from gptjax.machine.allocator import restart
from gptjax.report.cost import parameter_count, readable_bytes, readable_count
from gptjax.training.step import init_state, make_train_step


@dataclasses.dataclass
class Block:
    """Some steps; times in seconds."""

    took: float
    loop: float
    """Processor time of the threads that train."""
    others: float
    """Processor time of all other threads."""
    stood_still: float
    acknowledged: float
    """From the start of the save until it was safe; infinite if it was not when the steps were done."""


def make_batch(config: Config) -> Batch:
    B, T = config.train.batch_size, config.model.block_size
    tokens_BU = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, B, T + 1), dtype=np.int32)
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (1, B, T))
    return jax.device_put(Batch(tokens_BU[..., :-1], tokens_BU[..., 1:], None, positions_BT))


def cpu_seconds(threads: list[str]) -> float:
    """Processor time of these threads, user and system, from /proc."""
    ticks = 0
    for thread in threads:
        fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def run_block(step, state, batch, steps: int, loop: list[str], checkpoints: Checkpoints | None = None):
    """Returns the state after so many steps, the first of which comes after a save if there is somewhere to."""
    begin, loop_before, all_before = time.monotonic(), cpu_seconds(loop), time.process_time()
    stood_still, acknowledged, saved = 0.0, math.inf, int(state.step)
    if checkpoints is not None:
        checkpoints.save(state, {}, None)
        stood_still = time.monotonic() - begin
    for _ in range(steps):
        state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()
        if checkpoints is not None and checkpoints.acknowledged == saved:
            acknowledged = min(acknowledged, time.monotonic() - begin)
    took, loop_took = time.monotonic() - begin, cpu_seconds(loop) - loop_before
    others = time.process_time() - all_before - loop_took
    return state, Block(took, loop_took, others, stood_still, acknowledged)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="configs/gpt2_124m.yaml")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    config = load_config(options.preset)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=50257, block_size=options.block_size),
        train=dataclasses.replace(config.train, batch_size=options.batch_size, micro_batch_size=0),
    )
    state = jax.jit(lambda: init_state(config))()
    step, batch = jax.jit(make_train_step(config), donate_argnums=0), make_batch(config)
    state, metrics = step(state, batch)
    metrics["loss"].block_until_ready()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{readable_count(parameter_count(state.params))} parameters, {readable_bytes(size)} a checkpoint")
    folder = Path(tempfile.mkdtemp(prefix="gptjax-checkpoint-"))
    checkpoints = Checkpoints(folder)
    loop = os.listdir("/proc/self/task")  # none of these threads ends, and those that save are yet to come
    try:
        state, first = run_block(step, state, batch, 3, loop, checkpoints)
        print(f"the first save: stood still for {first.stood_still:.2f} s")
        checkpoints.wait()
        state, usual = run_block(step, state, batch, 3, loop)
        steps = max(3, round(3 * options.seconds / usual.took))
        costs, processor = [], []
        for _ in range(options.pairs):
            state, without = run_block(step, state, batch, steps, loop)
            state, saving = run_block(step, state, batch, steps, loop, checkpoints)
            costs.append(saving.took - without.took)
            processor.append(saving.others - without.others)
            print(
                f"{steps} steps {without.took:.2f} s, with a save {saving.took:.2f} s: {costs[-1]:+.2f} s; stood still"
                f" {saving.stood_still:.2f} s; safe after {saving.acknowledged:.1f} s; processor time"
                f" {saving.loop - without.loop:+.2f} s of the loop, {processor[-1]:.2f} s of others",
                flush=True,
            )
            checkpoints.wait()
        cost = statistics.median(costs)
        print(
            f"a save costs {cost:.2f} s: {100 * cost / 60:.1f} % of the time at one a minute (median of {len(costs)}),"
        )
        print(f"and {statistics.median(processor):.2f} s of processor time in threads that are not the loop's")
    finally:
        checkpoints.close()
        shutil.rmtree(folder)


if __name__ == "__main__":
    restart()  # as the trainer does
    main()
