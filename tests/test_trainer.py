"""Whole runs: what is written, and that going on is the same as never having stopped."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptjax.checkpoints.run_dir import load_run, write_description, write_run
from gptjax.config.reader import load_config
from gptjax.errors import UserError
from gptjax.report.metrics import MetricsFile, read_metrics
from gptjax.tasks import pretrain
from gptjax.text.tokenizers.plain import CharTokenizer
from gptjax.training import evaluate, in_flight, precision, resolve, trainer
from gptjax.training.guard import locked
from tests.faults.runs import SHARED_CACHE, process_config, wait_for_rows, write_config
from tests.tiny import CONFIG, HARD, assert_trees_equal, final_state, init_state, replace, rows, run_config


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("unbroken"), **HARD)
    assert trainer.train(config) == 0
    return config, rows(config), final_state(config)


def test_a_run_writes_what_its_readers_rely_on(unbroken):
    config, metrics, (state, _) = unbroken
    run_dir = Path(config.run_dir)
    steps = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens"} <= steps[0].keys()
    assert [row["tokens"] for row in steps] == [256 * n for n in range(1, 7)]
    evaluations = [row for row in metrics if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6]
    for row in evaluations:
        assert row["perplexity"] == pytest.approx(np.exp(row["val_loss"]))
        assert row["bits_per_byte"] > row["val_loss"] / np.log(2)  # a byte a token, and end-of-text has none
    assert int(state.step) == 6
    assert (run_dir / "samples.txt").read_text().count("--- step") == 2
    assert load_config(run_dir / "config.yaml").model.vocab_size == 257


def test_logging_evaluation_and_sample_follow_their_options(tmp_path, unbroken):
    config, expected_rows, _ = unbroken
    train = {"log_every": 4, "eval_windows": 2, "sample_prompt": "fff"}
    other = replace(config, run_dir=str(tmp_path / "run"), train=train)
    trainer.train(other)
    assert [row["step"] for row in rows(other) if "loss" in row] == [1, 4, 6]
    losses, expected = (
        [row["val_loss"] for row in table if "val_loss" in row] for table in (rows(other), expected_rows)
    )
    assert losses != expected, "two windows are not eight"
    assert "--- step 3\nfff" in (Path(other.run_dir) / "samples.txt").read_text()


def test_the_written_config_reproduces_the_run(tmp_path, unbroken):
    config, expected_rows, _ = unbroken
    again = dataclasses.replace(load_config(Path(config.run_dir) / "config.yaml"), run_dir=str(tmp_path / "again"))
    assert trainer.train(again) == 0
    assert rows(again) == expected_rows


def test_a_finished_run_says_so_and_can_be_prolonged(tmp_path, unbroken, capsys):
    config, *_ = unbroken
    assert trainer.train(config) == 0
    assert "is at step 6 already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"n_layer": 1, "dropout": 0.2}}, "model.n_layer 2 -> 1"),
        ({"seed": 7}, "seed 0 -> 7"),
        (
            {"train": {"batch_size": 4, "micro_batch_size": 4, "ema": 0.9, "sample_tokens": 4}},
            "train.batch_size 8 -> 4",
        ),
        ({"data": {"validation_fraction": 0.3}}, "data.validation_fraction 0.1 -> 0.3"),
    ],
)
def test_another_config_in_the_same_run_directory_is_refused(unbroken, change, message):
    config, *_ = unbroken
    with pytest.raises(UserError, match="holds a run of another config: .*" + message):
        trainer.train(replace(config, **change))


def test_other_data_under_the_same_config_is_refused(tmp_path):
    config = run_config(tmp_path, train={"num_steps": 1, "eval_every": 0})
    trainer.train(config)
    (tmp_path / "corpus" / "000.txt").write_text("another text\n" * 50)
    with pytest.raises(UserError, match="the data is not what this run was trained on"):
        trainer.train(replace(config, train={"num_steps": 2}))


def test_init_from_starts_with_the_other_runs_weights(tmp_path, unbroken):
    base, *_ = unbroken
    config = run_config(tmp_path, init_from=base.run_dir, train={"num_steps": 1}, optim={"learning_rate": 0.0,
                        "min_learning_rate": 0.0})  # fmt: skip
    assert trainer.train(config) == 0
    assert_trees_equal(load_run(Path(config.run_dir)).params, load_run(Path(base.run_dir)).params)


def test_init_from_refuses_another_shape(tmp_path, unbroken):
    base, *_ = unbroken
    with pytest.raises(UserError, match=r"model.n_layer=3 differs from 2 of init_from"):
        trainer.train(run_config(tmp_path, init_from=base.run_dir, model={"n_layer": 3}))


def test_loss_falls_and_the_best_checkpoint_is_kept(tmp_path):
    config = run_config(tmp_path, train={"num_steps": 40, "eval_every": 10, "keep_checkpoints": 1, "unroll": 1})
    trainer.train(config)
    losses = {row["step"]: row["val_loss"] for row in rows(config) if "val_loss" in row}
    assert min(losses.values()) < 0.8 * np.log(257)
    assert load_run(Path(config.run_dir), "best").step == min(losses, key=lambda step: losses[step])


def test_after_an_early_stop_the_same_command_says_so_and_stops(tmp_path, capsys):
    still = {"learning_rate": 0.0, "min_learning_rate": 0.0}
    config = run_config(tmp_path, optim=still, train={"num_steps": 50, "eval_every": 1, "patience": 2})
    assert trainer.train(config) == 0
    expected = rows(config)
    capsys.readouterr()
    assert trainer.train(config) == 0
    assert "stopped early at step 3: 2 evaluations without a new best loss" in capsys.readouterr().out
    assert rows(config) == expected
    assert trainer.train(replace(config, train={"patience": 4})) == 0
    assert rows(config)[-1]["step"] == 5


def snapshot(run_dir: str) -> dict[Path, tuple[bytes, int]]:
    """Every file of a run with its content and the time of its last change; the lock is not part of the run."""
    paths = (path for path in Path(run_dir).rglob("*") if path.is_file() and path.name != "lock")
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_a_call_that_trains_nothing_changes_nothing(unbroken):
    config, *_ = unbroken
    before = snapshot(config.run_dir)
    assert trainer.train(replace(config, train={"log_every": 3, "num_steps": 5})) == 0
    with pytest.raises(UserError):
        trainer.train(replace(config, seed=7))
    assert snapshot(config.run_dir) == before


def test_a_start_that_fails_leaves_nothing(tmp_path):
    config = run_config(tmp_path, run_dir=str(tmp_path / "runs" / "a"), data={"path": (str(tmp_path / "nothing"),)})
    with pytest.raises(UserError, match="nothing"):
        trainer.train(config)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "note.txt").touch()
    with pytest.raises(UserError, match="nothing"):
        trainer.train(config)
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["note.txt"]


@pytest.mark.slow
def test_losses_over_other_windows_are_not_compared(tmp_path, capsys):
    still = {"learning_rate": 0.0, "min_learning_rate": 0.0, "schedule": "cosine"}
    train = {"num_steps": 2, "eval_every": 1, "save_every": 1, "eval_windows": 2}
    config = run_config(tmp_path, optim=still, train=train)
    assert trainer.train(config) == 0
    other = replace(config, train={"num_steps": 4, "eval_windows": 0, "patience": 9})
    assert trainer.train(other) == 0
    assert "was measured on other validation data; the next evaluation counts as the best" in capsys.readouterr().out
    losses = [row["val_loss"] for row in rows(config) if "val_loss" in row]
    assert losses[0] == losses[1] != losses[2] == losses[3]
    assert final_state(other)[1]["loop"]["best_loss"] == losses[2]
    assert load_run(Path(config.run_dir), "best").step == 3, "not the lowest number, which is of other windows"
    same = replace(other, train={"num_steps": 5, "eval_windows": 10_000})  # all, by another number
    assert trainer.train(same) == 0
    assert "other validation data" not in capsys.readouterr().out


def interrupted(monkeypatch, module, name: str) -> None:
    """A signal arrives when a function is called; the run that follows is stopped by it."""
    arrived, function = [], getattr(module, name)

    class Signals(trainer.Signals):
        @property
        def received(self):
            return signal.SIGTERM if arrived else None

        @received.setter
        def received(self, value):
            pass

    def call(*args, **more):
        arrived.append(True)
        return function(*args, **more)

    monkeypatch.setattr(trainer, "Signals", Signals)
    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("last", [False, True])
def test_an_evaluation_is_abandoned_and_made_when_the_run_resumes(tmp_path, unbroken, capsys, last):
    config, expected_rows, (state, meta) = unbroken
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"))
    if last:
        shutil.copytree(unbroken[0].run_dir, config.run_dir)
        shutil.rmtree(Path(config.run_dir) / "checkpoints" / "00000006")
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, pretrain, "measure")
        assert trainer.train(config) == 143
    assert "evaluation abandoned" in capsys.readouterr().out
    step = 6 if last else 3
    assert (rows(config)[-1]["step"], "val_loss" in rows(config)[-1]) == (step, False)
    assert load_run(Path(config.run_dir), "latest").val_loss is None
    assert trainer.train(config) == 0
    assert rows(config) == expected_rows
    assert load_run(Path(config.run_dir), "latest").val_loss == expected_rows[-1]["val_loss"]
    assert_trees_equal(final_state(config)[0], state)
    assert final_state(config)[1] == meta


def test_a_sample_is_abandoned_too(tmp_path, monkeypatch, capsys):
    config = run_config(tmp_path, train={"sample_tokens": 30, "eval_every": 2})
    interrupted(monkeypatch, evaluate, "sample_texts")
    assert trainer.train(config) == 143
    printed = capsys.readouterr().out
    assert "sample abandoned" in printed and "stopped at step 2" in printed
    manifest = load_run(Path(config.run_dir), "latest")
    assert (manifest.step, manifest.val_loss) == (2, rows(config)[-1]["val_loss"])


class Result:
    """A result that takes some time of a clock to compute."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.done = clock, seconds, False

    def block_until_ready(self):
        self.clock.now += self.seconds
        self.done = True


@pytest.mark.parametrize(("seconds", "unfinished"), [(10.0, 0), (0.5, 0), (0.125, 2), (0.015625, 16)])
def test_long_steps_are_dispatched_one_at_a_time(monkeypatch, seconds, unfinished):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(in_flight, "time", clock)
    steps, made = in_flight.InFlight(), []
    for _ in range(100):
        made.append(Result(clock, seconds))
        steps.add(made[-1])
        steps.wait()
    assert sum(not result.done for result in made) == unfinished


@pytest.mark.slow
def test_the_run_does_not_depend_on_the_number_of_devices(tmp_path, unbroken):
    config, expected_rows, _ = unbroken
    alone = replace(config, run_dir=str(tmp_path / "one"), cache_dir=str(SHARED_CACHE))
    script = "import jax; jax.config.update('jax_num_cpu_devices', 1)\n"
    path = write_config(alone)
    code = f"{script}from gptjax.cli import main; raise SystemExit(main(['train', {str(path)!r}]))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    for row, expected in zip(rows(alone), expected_rows, strict=True):
        if "loss" in row:
            np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)


def test_a_killed_run_goes_on(tmp_path):
    config = process_config(tmp_path, train={"num_steps": 200, "save_every": 20, "eval_every": 0, "unroll": 1})
    command = [sys.executable, "-m", "gptjax", "train", str(write_config(config))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    wait_for_rows(config, 45)
    process.kill()
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming from step" in done.stdout
    assert [row["step"] for row in rows(config) if "loss" in row] == list(range(1, 201))


def test_a_run_directory_has_one_writer(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on "), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_metrics_forget_what_will_be_made_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3)) + '{"step": 4, "lo')
    file = MetricsFile(tmp_path, 2)
    file.write({"step": 3, "again": True})
    file.close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        load_run(tmp_path)
    config = replace(CONFIG, run_dir=str(tmp_path))
    write_run(tmp_path, config, init_state(config).params, None)
    assert load_run(tmp_path).step == 0
    with pytest.raises(UserError, match="already contains a run"):
        write_run(tmp_path, config, init_state(config).params, None)


def test_a_run_goes_on_in_the_precision_that_it_began_in(tmp_path, monkeypatch):
    config = replace(CONFIG, run_dir=str(tmp_path), train={"compute_dtype": "auto"})
    for on_cpu, chosen in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda on_cpu=on_cpu: on_cpu)
        settled = resolve.with_compute_dtype(config, tmp_path)
        assert settled.train.compute_dtype == chosen
    write_description(tmp_path, settled, None)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    assert resolve.with_compute_dtype(config, tmp_path).train.compute_dtype == "float32"


def test_a_sample_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fail(*_args, **_kwargs):
        raise UserError("token id 400 is outside the vocabulary")

    monkeypatch.setattr(evaluate, "sample_texts", fail)
    config = run_config(tmp_path, train={"sample_tokens": 4, "eval_every": 2, "num_steps": 4})
    assert trainer.train(config) == 0
    assert capsys.readouterr().out.count("no sample: UserError: token id 400") == 2
    assert load_run(Path(config.run_dir), "latest").step == 4


def test_an_evaluation_that_fails_ends_the_run_after_it_has_saved(tmp_path, monkeypatch):
    def fail(*_args):
        raise RuntimeError("evaluation failed")

    monkeypatch.setattr(trainer, "evaluate", fail)
    config = run_config(tmp_path, train={"eval_every": 3, "save_every": 0})
    with pytest.raises(RuntimeError, match="evaluation failed"):
        trainer.train(config)
    assert load_run(Path(config.run_dir), "latest").step == 3


def test_the_default_prompt_is_one_that_the_tokenizer_can_encode():
    prompts = [resolve._sample_prompt(CONFIG, CharTokenizer(text, has_end_of_text=False)) for text in (" abc", "\nabc")]
    assert prompts == [" ", "\n"]
    config = replace(CONFIG, train={"sample_prompt": "é"})
    with pytest.raises(UserError, match=r"train.sample_prompt='é': character 'é' \(U\+00E9\)"):
        resolve._sample_prompt(config, CharTokenizer("abc", has_end_of_text=False))
