"""What checkpoints cost a run: python bench/checkpoint.py [--preset configs/gpt2_124m.yaml] [--seconds 20].

Trains on random tokens, first without saving, then three times for as long with one save at the beginning, which is
written while training goes on; says how long the loop stood still, and how much longer the steps took than without it.
The first save also pays for memory that later ones find at hand.
"""

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from gptjax.batches.pretraining import Batch
from gptjax.config import Config
from gptjax.config_io import load_config
from gptjax.report.cost import parameter_count, readable_bytes, readable_count
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.step import init_state, make_train_step


def make_batch(config: Config) -> Batch:
    B, T = config.train.batch_size, config.model.block_size
    tokens_BU = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, B, T + 1), dtype=np.int32)
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (1, B, T))
    return jax.device_put(Batch(tokens_BU[..., :-1], tokens_BU[..., 1:], None, positions_BT))


def measure(step, state, batch, seconds: float, checkpoints: Checkpoints | None):
    """Trains for `seconds`; saves at the start, if there is somewhere to. Returns the state, step times and stalls."""
    times, stalls, begin = [], [], time.monotonic()
    while time.monotonic() - begin < seconds:
        start = time.monotonic()
        if checkpoints is not None and not stalls:
            checkpoints.save(state, {}, None)
            stalls.append(time.monotonic() - start)
        state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()
        times.append(time.monotonic() - start)
    return state, times, stalls


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="configs/gpt2_124m.yaml")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    config = load_config(options.preset)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=50257, block_size=options.block_size),
        train=dataclasses.replace(config.train, batch_size=options.batch_size, micro_batch_size=0),
    )
    state = jax.jit(lambda: init_state(config))()
    step, batch = jax.jit(make_train_step(config), donate_argnums=0), make_batch(config)
    for _ in range(2):
        state, metrics = step(state, batch)
        metrics["loss"].block_until_ready()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"{readable_count(parameter_count(state.params))} parameters, {readable_bytes(size)} a checkpoint")
    folder = Path(tempfile.mkdtemp(prefix="gptjax-checkpoint-"))
    checkpoints = Checkpoints(folder)
    try:
        state, plain, _ = measure(step, state, batch, options.seconds, None)
        usual = statistics.median(plain)
        print(f"step {usual * 1e3:.0f} ms without saves ({min(plain) * 1e3:.0f} to {max(plain) * 1e3:.0f})")
        for _ in range(3):
            state, saving, stalls = measure(step, state, batch, options.seconds, checkpoints)
            lost = sum(saving) - usual * len(saving)
            print(f"the loop stood still for {stalls[0] * 1e3:.0f} ms; the steps after it: "
                  + " ".join(f"{t * 1e3:.0f}" for t in saving[:8]) + " ms")  # fmt: skip
            print(f"a save costs {lost:.2f} s: {100 * lost / 60:.1f} % of the time at one a minute", flush=True)
    finally:
        checkpoints.close()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
