"""Whether a run that is killed and goes on has the bits of one that never was: `gptjax verify-resume`.

Runs are processes of their own, killed by SIGKILL at random moments. What is compared is the arrays of the last
checkpoint, bit by bit, and the metrics, but for what depends on the clock.
"""

import dataclasses
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from gptjax.checkpoints.checkpoint import FOLDER
from gptjax.checkpoints.choice import NAME
from gptjax.checkpoints.manifest import MANIFEST
from gptjax.config.reader import to_yaml
from gptjax.config.run import Config
from gptjax.config.verbs import VerifyResumeConfig
from gptjax.errors import UserError
from gptjax.machine import compile_cache
from gptjax.ops.scheduling import deterministic_ops_requested
from gptjax.report.metrics import METRICS_FILE, read_metrics
from gptjax.training.setup import load_state

CLOCK = ("tokens_per_s",)  # metrics that depend on the clock
KILL_WITHIN = 0.6  # seconds


class Process(Protocol):
    """What is asked of a process that trains."""

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        ...

    def wait(self) -> int:
        """Waits for its end; its exit status."""
        ...

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        ...


def run_verify_resume(config: Config, options: VerifyResumeConfig) -> int:
    """Prints whether a run that is killed ends with the bits of one that is not; status 1: it does not."""
    compile_cache.start(config.cache_dir)
    difference = verify_resume(config, options)
    if difference:
        print(f"DIFFERENT: {difference}{hint()}")
        return 1
    print(f"the same: all arrays and metrics of {options.steps} steps, after {options.kills} kills, bit for bit")
    return 0


def verify_resume(config: Config, options: VerifyResumeConfig, notify: Callable[[str], None] = print) -> str:
    """Trains twice for `options.steps` steps, once with kills; names the first difference, empty where there is none.

    Both runs lie in a temporary folder, which is removed.

    Raises:
        UserError: A run fails by itself, or a run goes on from an older step than it had acknowledged.
    """
    train = dataclasses.replace(
        config.train,
        num_steps=options.steps,
        save_every=min(options.save_every, options.steps),
        log_every=1,
        eval_every=0,
        keep_checkpoints=2,
    )
    with tempfile.TemporaryDirectory(prefix="gptjax-verify-resume-") as folder:
        configs = [
            dataclasses.replace(config, run_dir=str(Path(folder) / name), train=train)
            for name in ("unbroken", "killed")
        ]
        notify(f"a run of {options.steps} steps that is left alone")
        _finish(_start(configs[0]), configs[0])
        kill_often(configs[1], options.kills, random.Random(options.kill_seed), notify)
        return first_difference(*(Path(c.run_dir) for c in configs))


def kill_often(
    config: Config,
    kills: int,
    chance: random.Random,
    notify: Callable[[str], None],
    start: Callable[[Config], Process] | None = None,
) -> list[int]:
    """Trains `config` to its end, killed `kills` times; returns the newest acknowledged step at each kill.

    Every other kill comes at any moment, start-up included; the others soon after a save was acknowledged, so that the
    run gets on.

    Args:
        config: The run.
        kills: How many.
        chance: Draws the moments.
        notify: Told of each kill.
        start: Starts a process that trains; None: the command line.

    Raises:
        UserError: A run failed by itself, or went on from an older step than was acknowledged.
    """
    run_dir, start = Path(config.run_dir), start or _start
    steps: list[int] = []
    for number in range(kills):
        before = acknowledged(run_dir)
        process = start(config)
        while number % 2 and process.poll() is None and acknowledged(run_dir) == before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, KILL_WITHIN))
        ended = process.poll()
        process.kill()
        process.wait()
        _check(config, ended or 0, before)
        steps.append(acknowledged(run_dir))
        notify(f"kill {number + 1} of {kills}: step {steps[-1]} was acknowledged")
    _finish(start(config), config, steps[-1] if steps else 0)
    return steps


def hint() -> str:
    """What to try where bits differ: on a GPU they do unless one asks, since attention is then slower."""
    if jax.default_backend() != "gpu" or deterministic_ops_requested():
        return ""
    return "; a GPU gives the same bits with XLA_FLAGS=--xla_gpu_deterministic_ops=true"


def first_difference(expected: Path, actual: Path) -> str:
    """Names the first array or row of metrics in which two runs differ, in words; empty: none."""
    states = [load_state(run_dir)[0] for run_dir in (expected, actual)]
    leaves = [jax.tree_util.tree_leaves_with_path(jax.device_get(state)) for state in states]
    for (path, one), (other_path, other) in zip(*leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if path != other_path or one.dtype != other.dtype or one.shape != other.shape:
            return f"{name}: another array"
        differs = np.asarray(one).reshape(-1).view(np.uint8) != np.asarray(other).reshape(-1).view(np.uint8)
        if differs.any():
            largest = float(np.max(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))))
            return f"{name}: differs by up to {largest:.3g}"
    rows = [[_timeless(row) for row in read_metrics(run_dir)] for run_dir in (expected, actual)]
    for one, other in zip(*rows, strict=False):
        if one != other:
            return f"{METRICS_FILE}, step {one['step']}: {one} and {other}"
    return "" if len(rows[0]) == len(rows[1]) else f"{METRICS_FILE}: {len(rows[0])} and {len(rows[1])} rows"


def acknowledged(run_dir: Path) -> int:
    """The newest step whose checkpoint has its manifest; 0: none."""
    folder = run_dir / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if NAME.fullmatch(name) and (folder / name / MANIFEST).exists()), default=0)


def log_file(config: Config) -> Path:
    """Where a run's process writes what it prints."""
    return Path(config.run_dir).with_suffix(".log")


def _start(config: Config) -> subprocess.Popen[bytes]:
    path = Path(config.run_dir).with_suffix(".yaml")
    path.write_text(to_yaml(config), encoding="utf-8")
    with open(log_file(config), "wb") as log:
        command = [sys.executable, "-m", "gptjax", "train", str(path)]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _finish(process: Process, config: Config, acknowledged_before: int = 0) -> None:
    """Waits for a run to end by itself."""
    try:
        status = process.wait()
    finally:
        process.kill()  # where the waiting is interrupted
    _check(config, status, acknowledged_before)


def _check(config: Config, status: int, acknowledged_before: int) -> None:
    """Holds what a run printed against what must be.

    Raises:
        UserError: It failed by itself, or went on from an older step than was acknowledged.
    """
    lines = log_file(config).read_text(encoding="utf-8", errors="replace").splitlines()
    if status:
        raise UserError(f"the run ended by itself with status {status}: {lines[-1] if lines else ''}")
    resumed = [int(line.rpartition(" ")[2]) for line in lines if line.startswith("resuming from step ")]
    if resumed and resumed[0] < acknowledged_before:
        raise UserError(f"the run went on from step {resumed[0]}, though step {acknowledged_before} was acknowledged")
    if not resumed and any(line.startswith("device ") for line in lines) and acknowledged_before:
        raise UserError(f"the run began anew, though step {acknowledged_before} was acknowledged")


def _timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in CLOCK}
