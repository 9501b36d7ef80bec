"""Death of one of several processes."""

import signal
import time
from pathlib import Path

import pytest

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.optim import OptimConfig
from gptjax.parallel.cluster import EXIT_LOST
from gptjax.training import trainer
from tests.cluster.processes import LOSSES, largest_difference, started, wait_for_rows
from tests.faults.runs import process_config, write_config
from tests.tiny import HARD, replace, rows

CONSTANT = {"schedule": "constant", "min_learning_rate": OptimConfig().min_learning_rate}  # whatever num_steps is
ENDED = (EXIT_LOST, -signal.SIGABRT)  # by itself, or by jaxlib's coordination service, whichever sees it first


@pytest.mark.slow
@pytest.mark.fault(5, "SIGTERM to one of two processes", "both stop after the same step, saved once; 143")
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path, seen):
    sections = HARD | {"train": HARD["train"] | {"eval_every": 0, "num_steps": 1000}}
    config = process_config(tmp_path, **sections, optim=CONSTANT)
    with started(write_config(config), 2, 2) as processes:
        wait_for_rows(config, 3, processes)
        processes.running[1].send_signal(signal.SIGTERM)
        assert processes.wait() == [143, 143]
    step = rows(config)[-1]["step"]
    assert load_run(Path(config.run_dir), "latest", strict=True).step == step < 1000
    assert f"stopped at step {step} (signal 15); saved" in processes.out(0)
    seen(f"status 143 and 143, saved once; one process resumed, {goes_on_alone(tmp_path, config, step)}")


def goes_on_alone(tmp_path, config, step: int) -> str:
    """Resumes from `step` in this process, and compares with an uninterrupted run of one process."""
    longer = replace(config, train={"num_steps": step + 2})
    expected = replace(longer, run_dir=str(tmp_path / "expected"))
    assert trainer.train(longer) == 0 and trainer.train(expected) == 0
    difference = largest_difference(rows(longer), rows(expected))
    assert difference < LOSSES
    return f"losses within {LOSSES} of an unbroken run"


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
@pytest.mark.fault(6, "kill -9 of one of two processes", "the other ends in one line; resumes with one process")
def test_a_process_that_is_killed_ends_the_other(tmp_path, killed, seen):
    config = process_config(tmp_path, optim=CONSTANT, train={"num_steps": 3000, "save_every": 5, "eval_every": 0})
    with started(write_config(config), 2) as processes:
        wait_for_rows(config, 12, processes)
        processes.running[killed].kill()
        began = time.monotonic()
        other = processes.running[1 - killed].wait(timeout=120)
        seconds = time.monotonic() - began
    error = processes.error(1 - killed)
    assert other in ENDED and error.count("\n") == 1
    assert error.startswith("gptjax: another process of this run ended or cannot be reached")
    saved = load_run(Path(config.run_dir), "latest").step
    longer = replace(config, train={"num_steps": saved + 2})
    expected = replace(longer, run_dir=str(tmp_path / "expected"))
    assert trainer.train(longer) == 0 and trainer.train(expected) == 0
    assert largest_difference(rows(longer), rows(expected)) < LOSSES
    seen(
        f"process {killed} killed: status {other} of the other after {seconds:.0f} s, in one line; one process resumed"
    )


@pytest.mark.slow
@pytest.mark.fault(6, "one of two processes stops answering", "the other ends in one line, within lost_timeout")
def test_a_process_that_is_silent_ends_the_other(tmp_path, seen):
    config = process_config(tmp_path, train={"num_steps": 100_000, "save_every": 0, "eval_every": 0})
    with started(write_config(config), 2, flags=("--cluster.lost_timeout", "20")) as processes:
        wait_for_rows(config, 3, processes)
        processes.running[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        status = processes.running[0].wait(timeout=240)
        seconds = time.monotonic() - began
    error = processes.error(0)
    assert status in ENDED and error.count("\n") == 1 and "another process of this run" in error
    seen(f"lost_timeout 20: status {status} after {seconds:.0f} s, in one line")


@pytest.mark.slow
@pytest.mark.fault(6, "one of two processes never starts", "the other ends in one line, within start_timeout")
def test_a_process_that_never_comes_is_told(tmp_path, seen):
    config = process_config(tmp_path)
    told = ("--cluster.num_processes", "2", "--cluster.start_timeout", "8")
    with started(write_config(config), 1, flags=told) as processes:
        assert processes.wait()[0] == -signal.SIGABRT
    line = "gptjax: process 0 of 2: not all processes came within cluster.start_timeout=8 seconds to 127.0.0.1:"
    assert processes.error(0).startswith(line) and processes.error(0).count("\n") == 1
    seen("start_timeout 8: ended by jaxlib (134), in one line")
