"""The bytes that a plan says a step takes, against what a process that runs the step really holds.

    python bench/plan.py                            # prints the table
    python bench/plan.py --page docs/scaling.md     # and writes it there
    python bench/plan.py --only 0 3                 # some of the configurations

Devices are virtual: all are this machine's CPU. For each configuration one process plans, and another one makes the
state and runs the step; what counts is by how much its resident memory exceeds, at its peak, what it held when the
step was compiled and no array was there.
"""

import argparse
import ctypes
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from gptjax.batches.pretraining import Batch
from gptjax.config.reader import from_dict, read_flags
from gptjax.config.run import Config
from gptjax.machine import compile_cache
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.place import put
from gptjax.planning.compiled import compile_step, lower_step
from gptjax.planning.plan import resolve
from gptjax.training import selftest
from gptjax.training.step import init_state

STEPS = 2
SIZES = (
    "--model.vocab_size 8192 --model.block_size 256 --model.n_layer 4 --model.n_head 8 --model.n_embd 512 --mesh.data 1"
)
# What sets each apart, and its options.
CASES = (
    ("float32", "--train.batch_size 8 --train.unroll 1"),
    ("bfloat16, layers unrolled", "--train.batch_size 8 --train.compute_dtype bfloat16"),
    ("remat, 4 micro-batches", "--mesh.data 2 --train.batch_size 32 --train.micro_batch_size 8 --train.remat full"),
    ("average, grouped heads", "--mesh.fsdp 4 --model.n_kv_head 2 --train.ema 0.99 --train.unroll 1"),
    ("bfloat16, 4 micro-batches", "--mesh.fsdp 2 --mesh.tensor 2 --train.micro_batch_size 4"
     " --train.compute_dtype bfloat16"),
    ("positions sharded", "--mesh.context 2 --mesh.fsdp 2 --train.batch_size 8 --train.unroll 1"),
    ("stages", "--mesh.stage 4 --train.micro_batch_size 4 --train.unroll 1"),
    ("124 M, lion", "--model.n_layer 12 --model.n_head 12 --model.n_embd 768 --model.vocab_size 50257 --mesh.fsdp 4"
     " --optim.name lion --train.batch_size 4 --train.remat full --train.unroll 1"),
)  # fmt: skip


def config_of(number: int) -> Config:
    """A configuration of the table, and its mesh."""
    flags = f"{SIZES} --mesh.data 1 --train.compute_dtype float32 {CASES[number][1]}".split()
    return resolve(from_dict(Config, read_flags(Config, flags), "bench/plan.py"))


def planned(config: Config) -> int:
    """Bytes on all devices together, as planned."""
    return config.mesh.size * compile_step(config, make_mesh(config.mesh)).memory.total


def held(config: Config) -> int:
    """Bytes that the process got for the state and the step, at most."""
    mesh = make_mesh(config.mesh)
    lowered, state, shapes = lower_step(config, mesh)
    step = selftest.compile_safely(lowered)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    draw = jax.jit(lambda: init_state(config), out_shardings=where).lower().compile()
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: rng.integers(0, x.shape[2], x.shape, np.int32), shapes)
    batch = Batch(batch.inputs, batch.targets, np.zeros_like(batch.segments), batch.positions)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    arrays = put(batch, jax.tree.map(lambda x: x.sharding, shapes))
    state = jax.block_until_ready(draw())
    _forget_peak()
    for _ in range(STEPS):
        state, metrics = step(state, arrays)
        assert np.isfinite(float(metrics["loss"]))
    return _status("VmHWM") - before


def _status(name: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(number: int) -> tuple[int, int]:
    """Bytes planned and held, each in a process of its own."""
    # Blocks of their own for large arrays, given back when they are freed, so that freed memory does not count.
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536:glibc.malloc.arena_max=1"}
    found = []
    for what in ("planned", "held"):
        command = [sys.executable, __file__, "--one", str(number), what]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found.append(int(done.stdout.splitlines()[-1]))
    return found[0], found[1]


def row(number: int) -> str:
    """A row of the table."""
    plan, real = measure(number)
    sizes = dataclasses.asdict(config_of(number).mesh).items()
    layout = ", ".join(f"{name}={size}" for name, size in sizes if size > 1) or "one device"
    return f"| {CASES[number][0]} | {layout} | {plan / 1e6:,.0f} | {real / 1e6:,.0f} | {plan / real - 1:+.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", type=int, default=range(len(CASES)))
    parser.add_argument("--page", type=Path, help="a page whose table is replaced")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        config = config_of(int(arguments.one[0]))
        compile_cache.pretend_devices(config.mesh.size)
        print({"planned": planned, "held": held}[arguments.one[1]](config))
        return
    lines = ["| what sets it apart | mesh | planned, MB | held, MB | difference |", "|---|---|---:|---:|---:|"]
    print("\n".join(lines))
    for number in arguments.only:
        lines.append(row(number))
        print(lines[-1], flush=True)
    if arguments.page:
        from equality import write_table

        write_table(arguments.page, "plan", lines)


if __name__ == "__main__":
    main()
