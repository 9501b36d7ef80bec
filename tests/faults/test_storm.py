"""SIGKILL at random moments of starting, training and saving."""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gptjax.cli import main
from gptjax.config.cluster import ClusterConfig
from gptjax.config.log import LogConfig
from gptjax.config.verbs.verify_resume import VerifyResumeConfig
from gptjax.errors import UserError
from gptjax.verbs import verify_resume
from gptjax.verbs.verify_resume import acknowledged, first_difference, kill_often
from tests.faults.runs import SHARED_CACHE, environment, process_config, run, write_config
from tests.tiny import HARD, replace


class Forked:
    """A trainer that a storm server forked, with the interface of a process."""

    def __init__(self, server: subprocess.Popen[str], path: Path):
        assert server.stdin and server.stdout
        self._lines = server.stdout
        server.stdin.write(f"{path}\n")
        server.stdin.flush()
        self._pid, self._status = int(server.stdout.readline()), None
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        self._status = int(self._lines.readline())

    def poll(self) -> int | None:
        return self._status

    def wait(self) -> int:
        self._reader.join()
        assert self._status is not None
        return self._status

    def kill(self) -> None:
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-m", "tests.faults.storm", str(SHARED_CACHE)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    yield process
    assert process.stdin and process.stdout
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


def storm(tmp_path, server, kills: int, steps: int) -> str:
    train = HARD["train"] | {
        "num_steps": steps,
        "save_every": 5,
        "eval_every": 20,
        "log_every": 3,
        "keep_checkpoints": 2,
    }
    config = process_config(tmp_path, **HARD | {"train": train | {"sample_tokens": 0}})
    unbroken = replace(config, run_dir=str(tmp_path / "unbroken"))
    assert Forked(server, write_config(unbroken)).wait() == 0
    moments = kill_often(
        config, kills, random.Random(kills), lambda text: None, lambda config: Forked(server, write_config(config))
    )
    assert moments == sorted(moments), "acknowledged steps are never lost"
    assert acknowledged(Path(config.run_dir)) == steps
    assert first_difference(Path(unbroken.run_dir), Path(config.run_dir)) == ""
    aside = len([path for path in Path(config.run_dir, "checkpoints").iterdir() if "rejected" in path.name])
    return (
        f"{kills} kills at {len(set(moments))} different steps of {steps}; each start resumed from at least the"
        " acknowledged step; the final state and metrics equal an uninterrupted run;"
        f" {aside} unfinished saves set aside"
    )


EXPECTED = "resumes from at least the last acknowledged checkpoint; the final state equals an uninterrupted run"


@pytest.mark.slow
@pytest.mark.fault(1, "kill -9 at 20 random moments", EXPECTED)
def test_twenty_kills_lose_nothing(tmp_path, server, seen):
    seen(storm(tmp_path, server, kills=20, steps=150))


@pytest.mark.slow
@pytest.mark.fault(1, "kill -9 at 200 random moments", EXPECTED)
def test_two_hundred_kills_lose_nothing(tmp_path, server, seen):
    seen(storm(tmp_path, server, kills=200, steps=1500))


@pytest.mark.slow
def test_verify_resume_says_that_bits_are_the_same(tmp_path):
    config = process_config(tmp_path, **HARD)
    flags = ("--steps", "40", "--save_every", "5", "--kills", "2", "--kill_seed", "1")
    done = run("verify-resume", write_config(config), *flags, "--train.ema", "0.5")
    assert done.returncode == 0, done.stderr
    assert "the same: all arrays and metrics of 40 steps, after 2 kills, bit for bit" in done.stdout


@pytest.mark.slow
def test_verify_resume_names_what_differs(tmp_path, monkeypatch, capsys):
    def train(config, *_):
        from gptjax.training import trainer

        changed = {"learning_rate": 1e-3} if config.run_dir.endswith("killed") else {}
        assert trainer.train(replace(config, optim=changed)) == 0

    monkeypatch.setattr(verify_resume, "_start", lambda config: config)
    monkeypatch.setattr(verify_resume, "_finish", lambda process, config: train(config))
    monkeypatch.setattr(verify_resume, "kill_often", lambda config, *rest: train(config))
    path = write_config(process_config(tmp_path))
    assert main(["verify-resume", str(path), "--steps", "2"]) == 1
    assert "DIFFERENT: ema" not in (said := capsys.readouterr().out) and "differs by up to" in said


def test_verify_resume_trains_for_its_own_steps_alone_and_sends_nothing(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(verify_resume, "_start", trained.append)
    monkeypatch.setattr(verify_resume, "_finish", lambda *_: None)
    monkeypatch.setattr(verify_resume, "kill_often", lambda config, *_: trained.append(config))
    monkeypatch.setattr(verify_resume, "first_difference", lambda *_: "")
    train = {"num_steps": 1000, "num_epochs": 3.0, "eval_every": 10, "patience": 2, "strict_checkpoints": True}
    cluster = {"coordinator": "node:1", "num_processes": 2, "process_id": 0}
    log = {"tensorboard": True, "wandb": True, "project": "mine", "by_layer": True}
    config = replace(process_config(tmp_path), train=train, cluster=cluster, log=log)
    assert verify_resume.verify_resume(config, VerifyResumeConfig(steps=7), str) == ""
    assert len(trained) == 2
    for one in trained:
        assert (one.train.num_steps, one.train.num_epochs, one.train.patience) == (7, 0.0, 0)
        assert one.log == LogConfig(by_layer=True) and one.cluster == ClusterConfig()
        assert not one.train.strict_checkpoints, "a kill leaves checkpoints that are not complete"
        assert one.optim == config.optim and not Path(one.run_dir).is_relative_to(tmp_path)


def test_verify_resume_says_what_a_gpu_needs(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert not verify_resume.hint()
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert "XLA_FLAGS=--xla_gpu_deterministic_ops=true" in verify_resume.hint()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert not verify_resume.hint()


def test_a_run_that_goes_on_from_too_early_is_found(tmp_path):
    config = process_config(tmp_path)
    verify_resume.log_file(config).write_text("device      1 x cpu\n")
    with pytest.raises(UserError, match="started again from the beginning, though step 5 was acknowledged"):
        verify_resume._check(config, 0, 5)
    verify_resume.log_file(config).write_text("resuming from step 3\n")
    with pytest.raises(UserError, match="resumed from step 3, though step 5"):
        verify_resume._check(config, 0, 5)
    with pytest.raises(UserError, match="ended by itself with status 1"):
        verify_resume._check(config, 1, 0)
