"""`gptjax verify-resume`: checks that a run that is killed and resumed equals an uninterrupted run, bit for bit.

Each run is a separate process. SIGKILL kills it at random moments. The arrays of the last checkpoint are compared bit
by bit, and so are all metrics that do not depend on the clock.
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
from gptjax.config.cluster import ClusterConfig
from gptjax.config.log import LogConfig
from gptjax.config.reader import to_yaml
from gptjax.config.run import Config
from gptjax.config.verbs.verify_resume import VerifyResumeConfig
from gptjax.errors import UserError
from gptjax.machine import compile_cache
from gptjax.ops.scheduling import deterministic_ops_requested
from gptjax.report.metrics import METRICS_FILE, read_metrics
from gptjax.training.resume import load_state

CLOCK = ("tokens_per_s",)  # metrics that depend on the clock
KILL_WITHIN = 0.6  # seconds


class Process(Protocol):
    """A training process."""

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        ...

    def wait(self) -> int:
        """Waits for the end of the process; returns its exit status."""
        ...

    def kill(self) -> None:
        """Sends SIGKILL, if the process still runs."""
        ...


def run_verify_resume(config: Config, options: VerifyResumeConfig) -> int:
    """Prints whether a killed and resumed run equals an uninterrupted one; returns status 1 if not."""
    compile_cache.start(config.cache_dir)
    difference = verify_resume(config, options)
    if difference:
        print(f"DIFFERENT: {difference}{hint()}")
        return 1
    print(f"the same: all arrays and metrics of {options.steps} steps, after {options.kills} kills, bit for bit")
    return 0


def verify_resume(config: Config, options: VerifyResumeConfig, notify: Callable[[str], None] = print) -> str:
    """Trains twice for `options.steps` steps, once with kills; returns the first difference, empty if there is none.

    Both runs are in a temporary folder, which is removed.

    Raises:
        UserError: A run fails by itself, or resumes from an older step than it had acknowledged.
    """
    train = dataclasses.replace(
        config.train,
        num_steps=options.steps,
        num_epochs=0.0,
        save_every=min(options.save_every, options.steps),
        log_every=1,
        eval_every=0,
        patience=0,
        keep_checkpoints=2,
        strict_checkpoints=False,  # a kill during a save leaves a checkpoint that is not complete
    )
    log = dataclasses.replace(LogConfig(), by_layer=config.log.by_layer)  # other programs get nothing of these runs
    with tempfile.TemporaryDirectory(prefix="gptjax-verify-resume-") as folder:
        configs = [
            dataclasses.replace(config, run_dir=str(Path(folder) / name), train=train, log=log, cluster=ClusterConfig())
            for name in ("unbroken", "killed")
        ]
        notify(f"an uninterrupted run of {options.steps} steps")
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
    """Trains `config` to its end and kills it `kills` times; returns the newest acknowledged step at each kill.

    Every other kill comes at a random moment, possibly during start-up. The others come soon after a save was
    acknowledged, so that the run makes progress.

    Args:
        config: The run.
        kills: Number of kills.
        chance: Draws the moments.
        notify: Called with one line for each kill.
        start: Starts a training process; None: uses the command line.

    Raises:
        UserError: A run failed by itself, or resumed from an older step than was acknowledged.
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
    """Suggests deterministic operations if bits differ on a GPU. They are not the default, because they are slower."""
    if jax.default_backend() != "gpu" or deterministic_ops_requested():
        return ""
    return "; a GPU gives the same bits with XLA_FLAGS=--xla_gpu_deterministic_ops=true"


def first_difference(expected: Path, actual: Path) -> str:
    """Describes the first array or row of metrics in which two runs differ; empty: they are equal."""
    states = [load_state(run_dir)[0] for run_dir in (expected, actual)]
    leaves = [jax.tree_util.tree_leaves_with_path(jax.device_get(state)) for state in states]
    for (path, one), (other_path, other) in zip(*leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if path != other_path or one.dtype != other.dtype or one.shape != other.shape:
            return f"{name}: another path, dtype or shape"
        differs = np.asarray(one).reshape(-1).view(np.uint8) != np.asarray(other).reshape(-1).view(np.uint8)
        if differs.any():
            largest = float(np.max(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))))
            return f"{name}: differs by up to {largest:.3g}"
    rows = [[_without_clock(row) for row in read_metrics(run_dir)] for run_dir in (expected, actual)]
    for one, other in zip(*rows, strict=False):
        if one != other:
            return f"{METRICS_FILE}, step {one['step']}: {one} and {other}"
    return "" if len(rows[0]) == len(rows[1]) else f"{METRICS_FILE}: {len(rows[0])} and {len(rows[1])} rows"


def acknowledged(run_dir: Path) -> int:
    """Returns the newest step whose checkpoint has a manifest; 0: none."""
    folder = run_dir / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if NAME.fullmatch(name) and (folder / name / MANIFEST).exists()), default=0)


def log_file(config: Config) -> Path:
    """File with the output of a run's process."""
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
        process.kill()  # if an exception interrupted the wait
    _check(config, status, acknowledged_before)


def _check(config: Config, status: int, acknowledged_before: int) -> None:
    """Checks the exit status and the output of a run.

    Raises:
        UserError: It failed by itself, or resumed from an older step than was acknowledged.
    """
    lines = log_file(config).read_text(encoding="utf-8", errors="replace").splitlines()
    if status:
        raise UserError(f"the run ended by itself with status {status}: {lines[-1] if lines else ''}")
    resumed = [int(line.rpartition(" ")[2]) for line in lines if line.startswith("resuming from step ")]
    if resumed and resumed[0] < acknowledged_before:
        raise UserError(f"the run resumed from step {resumed[0]}, though step {acknowledged_before} was acknowledged")
    if not resumed and any(line.startswith("device ") for line in lines) and acknowledged_before:
        raise UserError(f"the run started again from the beginning, though step {acknowledged_before} was acknowledged")


def _without_clock(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in CLOCK}
