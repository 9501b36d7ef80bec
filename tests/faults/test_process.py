"""Signals, full disks, two writers and changed configs."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gptjax.checkpoints import checkpoint
from gptjax.checkpoints.choice import NAME, choose
from gptjax.checkpoints.manifest import verify
from gptjax.checkpoints.run_dir import load_run
from gptjax.cli import main
from gptjax.config.reader import to_yaml
from gptjax.errors import UserError
from gptjax.training import trainer
from gptjax.training.guard import LOCK_FILE
from tests.faults.runs import (
    ROOT,
    checkpoints,
    environment,
    one_line,
    process_config,
    run,
    start,
    wait_for_rows,
    write_config,
)
from tests.tiny import HARD, assert_trees_equal, final_state, replace, rows, run_config

LONG = {"num_steps": 100_000, "save_every": 0, "eval_every": 0}


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own, of a few MB."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    # Three documents to train on, 4.2 steps an epoch: the last two steps belong to the next one.
    config = run_config(tmp_path_factory.mktemp("unbroken"), data={"max_documents": 4}, **HARD)
    assert trainer.train(config) == 0
    return config, rows(config), final_state(config)


def stopped_after(config, k):
    """Trains until a SIGTERM that comes in step k."""

    class Stopping(trainer.Signals):
        steps = 0

        @property
        def received(self):
            Stopping.steps += 1
            return signal.SIGTERM if Stopping.steps >= k else None

        @received.setter
        def received(self, _value):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Signals", Stopping)
        assert trainer.train(config) == 143


@pytest.mark.fault(
    23, "stopped three times within 6 steps, with dropout, accumulation, average", "all bits as if never stopped"
)
def test_a_run_that_is_stopped_again_and_again_has_the_same_bits(tmp_path, unbroken, seen):
    """After step 1, before the evaluation of step 3, and after it."""
    config, expected_rows, (expected_state, expected_meta) = unbroken
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))

    # The run stops at a step as a signal would stop it: the schedule still aims at the full number of steps.
    for k in (1, 2, 5):
        stopped_after(config, k)
        assert rows(config)[-1]["step"] < 6
    assert trainer.train(config) == 0
    state, meta = final_state(config)
    assert_trees_equal(state, expected_state)
    assert meta == expected_meta
    assert rows(config) == expected_rows
    seen("parameters, moments, average, counters and metrics are equal")


@pytest.mark.fault(3, "SIGTERM", "the step is finished and saved; 143")
def test_a_signal_saves_and_exits(tmp_path, seen):
    config = process_config(tmp_path, train=LONG)
    process = start("train", write_config(config))
    wait_for_rows(config, 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    seen(stopped_and_saved(config, output, process.returncode, 143))


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.fault(4, "SIGINT", "the step is finished and saved; 130")),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.fault(4, "SIGHUP", "the step is finished and saved; 129")),
    ],
)
def test_an_interrupt_and_the_end_of_a_terminal_save_too(tmp_path, number, status, capsys, seen):
    config = process_config(tmp_path, train=LONG)

    def send():
        wait_for_rows(config, 3)
        os.kill(os.getpid(), number)

    before = signal.signal(number, signal.default_int_handler)  # under nohup it would be ignored
    sender = threading.Thread(target=send)
    sender.start()
    try:
        returned = main(["train", str(write_config(config))])
    finally:
        sender.join()
        signal.signal(number, before)
    seen(stopped_and_saved(config, capsys.readouterr().out, returned, status))


def stopped_and_saved(config, output: str, status: int, expected: int) -> str:
    """Checks the end of a run that a signal has stopped; what was seen."""
    assert status == expected
    line = output.splitlines()[-1]
    assert "stopped at step" in line and "saved" in line
    assert load_run(Path(config.run_dir), "latest", strict=True).step == rows(config)[-1]["step"]
    return f"{line.partition(' (')[0]}, saved; status {status}"


SAVES_SLOWLY = """
import sys, time
from pathlib import Path
from gptjax.checkpoints import checkpoint
from gptjax.cli import main

def save_slowly(self, *args, save=checkpoint.Checkpoints.save):
    Path(sys.argv[2]).touch()
    time.sleep(float(sys.argv[3]))
    save(self, *args)

checkpoint.Checkpoints.save = save_slowly
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.fault(3, "a second SIGTERM while the first is served", "the process ends at once, without saving; 143")
def test_a_second_signal_ends_at_once(tmp_path, seen):
    config, marker = process_config(tmp_path, train=LONG), tmp_path / "saving"
    with script(SAVES_SLOWLY, write_config(config), marker, 120) as process:
        wait_for_rows(config, 3)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None and not marker.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)  # shorter than the save would take
    assert process.returncode == 143
    first, *second = error.splitlines()
    assert first.startswith("gptjax: SIGTERM: Stopping after this step")
    assert not (Path(config.run_dir) / "checkpoints").is_dir() and second == [
        "gptjax: stopped by a second signal (SIGTERM); nothing was saved since the first one"
    ]
    seen(f"{second[0].removeprefix('gptjax: ')}; status {process.returncode}")


STEPS_SLOWLY = """
import sys, time
from gptjax.batches.pretraining import PackedWindows
from gptjax.cli import main
from gptjax.training import trainer

def flush_slowly(self, *args, flush=trainer.Log.flush, **more):
    flush(self, *args, **more)
    time.sleep(1.0)

trainer.Log.flush = flush_slowly
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_signal_is_answered_while_the_main_thread_is_busy(tmp_path):
    config = process_config(tmp_path, train=LONG)
    with script(STEPS_SLOWLY, write_config(config)) as process:
        wait_for_rows(config, 2)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.stderr is not None
        assert "Stopping after this step" in process.stderr.readline()
        answered = time.monotonic() - began
        steps = len(rows(config))
        process.communicate(timeout=60)
    assert answered < 0.5, "the step takes a second"
    assert rows(config)[-1]["step"] <= steps + 1


PREPARES = """
import sys
from gptjax.cli import main
from gptjax.text import write_shards
write_shards.SHARD_TOKENS, write_shards.BATCH_CHARACTERS = 3000, 2000
sys.exit(main(["train", sys.argv[1]]))
"""
COMPILES = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from gptjax.cli import main
from gptjax.training import selftest

def compile_slowly(lowered):
    def chain(x):
        for i in range(6000):
            x = jnp.sin(x * i) @ x
        return x
    Path(sys.argv[2]).write_text("begun")
    jax.jit(chain).lower(jnp.ones((4, 4))).compile()
    Path(sys.argv[2]).write_text("done")

selftest.compile_safely = compile_slowly
sys.exit(main(["train", sys.argv[1]]))
"""
EARLY = "status 143, 130 or 129 at once, in one line; finished shards stay"


def script(source: str, *args: object, **more: str) -> subprocess.Popen[str]:
    """Starts a separate training program, with the signal handlers that a shell would leave."""
    before = [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    command = [sys.executable, "-c", source, *map(str, args)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**more), cwd=ROOT
    )
    for number, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), before, strict=True):
        signal.signal(number, handler)
    return process


def ended_early(process: subprocess.Popen[str], number: int) -> str:
    """Sends a signal, which must end the process soon; returns its output."""
    began = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    seconds = time.monotonic() - began
    assert process.returncode == 128 + number and seconds < 20, error
    line = one_line(error)
    assert line.startswith(f"stopped by {signal.Signals(number).name} before the first step")
    return line


@pytest.mark.slow
@pytest.mark.fault(3, "a signal while train prepares data", EARLY)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_data_is_prepared(tmp_path, number, seen):
    corpus = tmp_path / "corpus.jsonl"
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc déf\n", k=3000)) for _ in range(500)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"path": (str(corpus),)}
    config = process_config(tmp_path, data=data, train={"num_steps": 1, "eval_every": 0})
    path = write_config(dataclasses.replace(config, cache_dir=str(tmp_path / "cache")))
    with script(PREPARES, path, GPTJAX_NATIVE="0") as process:  # its cache is empty: it would compile kernels
        while process.poll() is None and len(list((tmp_path / "cache").glob("data/*.tmp/*.bin"))) < 5:
            time.sleep(0.01)
        line = ended_early(process, number)
    assert len(list((tmp_path / "cache").glob("data/*.tmp/*.bin"))) >= 5
    seen(f"{line.partition(';')[0]}: status {128 + number}")
    if number != signal.SIGTERM:
        return
    with script(PREPARES, path, GPTJAX_NATIVE="0") as process:
        output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    [resumed] = [text for text in output.splitlines() if "continues after" in text]
    seen(resumed)


@pytest.mark.fault(3, "a signal while train compiles", EARLY)
def test_a_signal_while_a_program_is_compiled(tmp_path, seen):
    path = write_config(process_config(tmp_path, train={"num_steps": 1, "eval_every": 0}))
    marker = tmp_path / "marker"
    with script(COMPILES, path, marker) as process:
        while process.poll() is None and not marker.exists():
            time.sleep(0.01)
        time.sleep(1)
        line = ended_early(process, signal.SIGTERM)
    assert marker.read_text() == "begun", "it did not wait for the compiler"
    seen(f"{line.partition(';')[0]}: status 143")


KILLED = """
import os, signal, sys
from gptjax.cli import main
from gptjax.checkpoints import checkpoint

def write_or_die(folder, step, *rest, write=checkpoint.write_manifest):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    write(folder, step, *rest)

checkpoint.write_manifest = write_or_die
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.fault(
    2, "the process is killed when all but the manifest is written", "the checkpoint before is used; nothing is deleted"
)
def test_a_kill_between_the_commit_and_the_manifest(tmp_path, seen):
    config = process_config(tmp_path, train={"eval_every": 0})
    path = write_config(config)
    with script(KILLED, path) as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert "00000006" in checkpoints(config), "the arrays were committed"
    said = []
    assert load_run(Path(config.run_dir), "latest", notify=said.append).step == 4
    assert "has no manifest.json, so it was never finished" in said[0]
    assert trainer.train(config) == 0
    assert {"00000004", "00000006", "00000006.rejected"} <= set(checkpoints(config))
    seen(
        "killed with status -9: 00000006 rejected, 00000004 used; after the resume it is renamed and step 6 saved again"
    )


def test_an_interrupted_verb_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gptjax.verbs.prepare.prepare", interrupted)
    assert main(["prepare", str(write_config(run_config(tmp_path)))]) == 130
    assert one_line(capsys.readouterr().err) == "interrupted"


@pytest.mark.fault(4, "standard output is closed (| head -1)", "training continues to its end")
def test_a_closed_standard_output_stops_no_training(tmp_path, seen):
    config = process_config(tmp_path, train={"num_steps": 40, "eval_every": 10, "save_every": 0})
    process = start("train", write_config(config))
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), error) == (0, "")
    assert rows(config)[-1]["step"] == 40
    assert load_run(Path(config.run_dir), "latest", strict=True).step == 40
    seen("40 of 40 steps, saved; status 0")


@pytest.mark.slow
@pytest.mark.fault(
    7, "too little room for a save", "reported with path and free bytes; older checkpoints stay; status 2"
)
def test_a_full_disk_leaves_older_checkpoints(tmp_path, seen):
    with small_disk(tmp_path / "small", "3m") as disk:
        config = process_config(tmp_path, run_dir=str(disk / "run"), train={"eval_every": 0, "num_steps": 40})
        path = tmp_path / "c.yaml"
        path.write_text(to_yaml(config))
        done = run("train", path)
        assert done.returncode == 2
        error = one_line(done.stderr)
        assert "not saved: the disk is full" in error and "bytes are free there, older checkpoints are intact" in error
        kept = checkpoints(config)
        assert kept and not [name for name in kept if "tmp" in name]
        newest = choose(disk / "run" / "checkpoints", "latest", strict=True).folder
        assert newest is not None and newest.name == kept[-1]
        assert rows(config)[-1]["step"] == 40, "training went on while it could not save"
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        again = run("train", path)
        assert again.returncode == 0 and f"resuming from step {int(kept[-1])}" in again.stdout
    seen(f"{error.partition('checkpoints/')[2]}; it trained to its end, then failed; with free space it resumed")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's and TensorStore's
@pytest.mark.fault(7, "the disk fills up while arrays are written", "the save fails, older ones stay, no leftovers")
def test_a_disk_that_fills_up_during_a_save(tmp_path, monkeypatch, unbroken, seen):
    _, _, (state, meta) = unbroken
    monkeypatch.setattr(checkpoint, "OVERHEAD", -(10**9))
    said = []
    with small_disk(tmp_path / "small", "1m") as disk:
        writer = checkpoint.Checkpoints(disk / "run", 10, said.append)
        for step in range(1, 9):
            writer.save(dataclasses.replace(state, step=np.int32(step)), meta, None)
            writer.wait()
        names = sorted(path.name for path in writer.folder.iterdir() if NAME.fullmatch(path.name))
        assert said and all("the disk is full" in line for line in said)
        for name in names:
            verify(writer.folder / name)
        shutil.rmtree(writer.folder / names[0])
        writer.save(dataclasses.replace(state, step=np.int32(99)), meta, None)
        writer.close()
        assert writer.acknowledged == 99 and not writer.problem
        checkpoint.Checkpoints(disk / "run", 10, said.append).set_aside_damaged(choose(writer.folder, "latest", True))
        assert all(NAME.fullmatch(path.name) for path in writer.folder.iterdir())
    seen(f"{len(names)} saves verify, {len(said)} failed ({said[0].partition('saved: ')[2]}); with room the next works")


@pytest.mark.fault(8, "the disk is full for metrics.jsonl only", "reported once; training continues; no partial rows")
def test_metrics_that_cannot_be_written_stop_no_run(tmp_path, capsys, seen):
    config = process_config(tmp_path, train={"num_steps": 30, "eval_every": 0, "save_every": 10})
    with small_disk(tmp_path / "small", "4k") as disk:
        Path(config.run_dir).mkdir()
        (disk / "metrics.jsonl").write_text("")
        done_before = subprocess.run(
            ["mount", "--bind", str(disk / "metrics.jsonl"), str(touched(config))], capture_output=True
        )
        assert done_before.returncode == 0
        try:
            status = main(["train", str(write_config(config))])
            text = (Path(config.run_dir) / "metrics.jsonl").read_text()
        finally:
            subprocess.run(["umount", "--lazy", str(touched(config))], check=True)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    said = [line for line in printed.out.splitlines() if "cannot be written" in line]
    assert len(said) == 1 and "rows could not be written" in printed.out
    assert all(json.loads(line)["step"] for line in text.splitlines()) and text.endswith("\n")
    assert load_run(Path(config.run_dir), "latest", strict=True).step == 30
    seen(f"{said[0].partition('metrics.jsonl: ')[2]}; 30 of 30 steps, status 0")


def touched(config) -> Path:
    path = Path(config.run_dir) / "metrics.jsonl"
    path.touch()
    return path


@pytest.mark.fault(18, "a second train in the same run directory", "it exits at once and names the first")
def test_a_second_writer_is_refused(tmp_path, capsys, seen):
    config = process_config(tmp_path, train=LONG)
    path = write_config(config)
    first = start("train", path)
    wait_for_rows(config, 1)
    assert main(["train", str(path)]) == 2
    error = one_line(capsys.readouterr().err)
    assert f"is in use by process {first.pid} on " in error
    first.kill()
    first.communicate()
    seen(f"status 2: {error.rpartition('run: ')[2].replace(str(first.pid), 'PID').partition(' on ')[0]}")


@pytest.mark.fault(18, "the lock of a killed process is left", "the next start takes it over")
def test_a_stale_lock_is_taken_over(tmp_path, unbroken, seen):
    config, *_ = unbroken
    lock = Path(config.run_dir) / LOCK_FILE
    lock.write_text("process 1 on elsewhere\n")
    assert trainer.train(config) == 0
    assert str(os.getpid()) in lock.read_text()
    seen("taken over")


@pytest.mark.fault(19, "the run directory cannot be written to", "one line before anything is compiled; status 2")
@pytest.mark.parametrize("how", ["below a file", "read-only mount"])
def test_a_run_directory_that_cannot_be_written_to(tmp_path, how, capsys, seen):
    if how == "below a file":
        (tmp_path / "file").write_text("")
        config = process_config(tmp_path, run_dir=str(tmp_path / "file" / "run"))
        path = tmp_path / "c.yaml"
        path.write_text(write_config(replace(config, run_dir=str(tmp_path / "x"))).read_text())
        status = main(["train", str(path), "--run_dir", config.run_dir])
    else:
        with small_disk(tmp_path / "small", "1m") as disk:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            config = process_config(tmp_path, run_dir=str(tmp_path / "x"))
            status = main(["train", str(write_config(config)), "--run_dir", str(disk / "run")])
    assert status == 2
    printed = capsys.readouterr()
    error = one_line(printed.err)
    assert "cannot be written to" in error and "device" not in printed.out
    seen(f"{how}: run_dir=... {error.partition(' cannot')[1]}{error.partition(' cannot')[2]}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"n_layer": 1, "dropout": 0.2}}, "model.n_layer 2 -> 1"),
        ({"model": {"block_size": 16, "dropout": 0.2}}, "model.block_size 32 -> 16"),
        ({"train": {"batch_size": 16}}, "train.batch_size 8 -> 16"),
        ({"data": {"max_documents": 3}}, "data.max_documents 4 -> 3"),
        ({"data": {"validation_fraction": 0.3}}, "data.validation_fraction 0.1 -> 0.3"),
    ],
)
@pytest.mark.fault(20, "resumed with another shape, batch or data list", "rejected field by field")
def test_another_config_is_refused(unbroken, change, message, seen):
    config, *_ = unbroken
    with pytest.raises(UserError, match="holds a run of another config: .*" + message) as error:
        trainer.train(replace(config, **change))
    seen(str(error.value).partition("another config: ")[2].partition("; give")[0])


@pytest.mark.slow
@pytest.mark.fault(20, "resumed with another learning rate", "allowed, with a message")
def test_another_learning_rate_is_allowed(tmp_path, unbroken, capsys, seen):
    config, *_ = unbroken
    shutil.copytree(config.run_dir, tmp_path / "run")
    train = {"num_steps": 7, "eval_every": 2}
    changed = replace(config, run_dir=str(tmp_path / "run"), optim={"learning_rate": 1e-3}, train=train)
    assert trainer.train(changed) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "learning_rate" in line)
    assert line == "resuming with optim.learning_rate 0.003 -> 0.001"
    seen(line)


@pytest.mark.slow
@pytest.mark.fault(
    20, "resumed with another batch_size and other text", "only with train.allow_data_change, with a message"
)
def test_other_data_is_allowed_when_asked_for(tmp_path, capsys, seen):
    config = run_config(tmp_path, train={"num_steps": 1, "eval_every": 0})
    trainer.train(config)
    (tmp_path / "corpus" / "000.txt").write_text("another text\n" * 50)
    with pytest.raises(UserError, match=r"train\.allow_data_change=true"):
        trainer.train(replace(config, train={"num_steps": 2}))
    changed = {"num_steps": 2, "batch_size": 4, "allow_data_change": True}
    assert trainer.train(replace(config, train=changed)) == 0
    printed = capsys.readouterr().out
    assert "resuming with train.batch_size 8 -> 4" in printed and "resuming with other data than before" in printed
    seen("rejected without; with it: resuming with other data than before")


@pytest.mark.fault(21, "resumed under another tokenizer", "rejected by name, not by a shape")
def test_another_tokenizer_is_refused(tmp_path, seen):
    config = run_config(tmp_path, train={"num_steps": 1, "eval_every": 0}, tokenizer={"kind": "chars"})
    trainer.train(config)
    for changed in (
        replace(config, tokenizer={"kind": "bytes"}),
        replace(config, train={"num_steps": 2, "allow_data_change": True}),  # other characters
    ):
        with pytest.raises(UserError, match="tokenizer") as error:
            trainer.train(changed)
        seen(str(error.value).rpartition("run: ")[2].partition("; give")[0])
        for path in (tmp_path / "corpus").iterdir():
            path.write_text(path.read_text().replace("a", "z"))


@pytest.mark.slow
@pytest.mark.fault(22, "resumed on 1, 2, 4, 8 and again 1 devices", "the same order of data, losses within 1e-5")
def test_the_number_of_devices_may_change(tmp_path, seen):
    config = process_config(tmp_path, train={"num_steps": 10, "eval_every": 0, "save_every": 2})
    expected = replace(config, run_dir=str(tmp_path / "one"))
    assert run("train", write_config(expected)).returncode == 0
    for number, devices in enumerate((1, 2, 4, 8, 1), 1):
        code = (
            f"import jax; jax.config.update('jax_num_cpu_devices', {devices})\n"
            "from tests.faults.test_process import stop_at\n"
            f"stop_at({str(write_config(config))!r}, {2 * number})"
        )
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"device      {devices} x" in done.stdout
    losses, wanted = ([row["loss"] for row in rows(c) if "loss" in row] for c in (config, expected))
    difference = max(abs(a - b) / b for a, b in zip(losses, wanted, strict=True))
    assert len(losses) == 10 and difference < 1e-5
    seen(f"10 losses, largest relative difference {difference:.1e}")


def stop_at(path: str, step: int) -> None:
    """Trains to a step in a separate process, and stops there as by a signal."""
    from gptjax.config.reader import load_config

    config = load_config(path)
    first = choose(Path(config.run_dir) / "checkpoints", "latest", strict=True).manifest
    if step == config.train.num_steps:
        assert trainer.train(config) == 0
    else:
        stopped_after(config, step - (first.step if first else 0))
