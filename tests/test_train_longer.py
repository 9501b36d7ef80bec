"""Runs whose number of steps changes when they resume: the learning rate, and what is remembered of it."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.optim import OptimConfig
from gptjax.config.reader import load_config
from gptjax.training import trainer
from gptjax.training.schedules import make_schedule
from tests.tiny import replace, rows, run_config

PEAK, FINAL = 1.0, 0.1


def rates(num_steps: int, extended: tuple[str, ...], schedule: str = "cosine", warmup: int = 5) -> np.ndarray:
    config = OptimConfig(learning_rate=PEAK, min_learning_rate=FINAL, warmup_steps=warmup, schedule=schedule,
                         extended=extended)  # fmt: skip
    return np.array([float(make_schedule(config, num_steps)(jnp.int32(n))) for n in range(num_steps + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_run_that_is_continued_has_no_jump(schedule):
    planned = rates(100, (), schedule)
    for update in (60, 90, 100):
        longer = rates(200, (f"continue at {update} of 100",), schedule)
        np.testing.assert_array_equal(longer[:update], planned[:update])
        assert longer[update] == pytest.approx(planned[update])
        assert longer[-1] == pytest.approx(FINAL)
        assert np.all(np.diff(longer[5:]) <= 1e-7), "it never rises again"
        assert np.abs(np.diff(longer[update - 1 :])).max() <= np.abs(np.diff(planned[5:])).max() + 1e-6


def test_a_continued_cosine_is_a_cosine_from_the_present_rate():
    longer, start = rates(200, ("continue at 60 of 100",)), rates(100, ())[60]
    n = np.arange(60, 201)
    np.testing.assert_allclose(longer[60:], FINAL + (start - FINAL) * (1 + np.cos(np.pi * (n - 60) / 140)) / 2, 1e-5)


def test_a_restarted_run_warms_up_to_the_peak_and_decays():
    longer = rates(200, ("restart at 100 of 100",))
    assert longer[100] == pytest.approx(FINAL + (PEAK - FINAL) / 6) and longer[105] == PEAK
    n = np.arange(105, 201)
    np.testing.assert_allclose(longer[105:], FINAL + (PEAK - FINAL) * (1 + np.cos(np.pi * (n - 105) / 95)) / 2, 1e-5)


def test_changes_follow_each_other():
    longer = rates(300, ("continue at 50 of 100", "restart at 150 of 150"), "linear")
    np.testing.assert_array_equal(longer[:150], rates(150, ("continue at 50 of 100",), "linear")[:150])
    assert longer[155] == PEAK and longer[300] == pytest.approx(FINAL)


OPTIM = {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with a cosine schedule."""
    folder = tmp_path_factory.mktemp("finished")
    config = run_config(folder, optim=OPTIM, train={"num_steps": 4, "eval_every": 0, "save_every": 1})
    assert trainer.train(config) == 0
    return config


def longer(finished, folder: Path, **sections):
    """Copies the finished run, and trains it up to step 8 with other options."""
    config = replace(finished, run_dir=str(folder / "run"), train={"num_steps": 8})
    shutil.copytree(finished.run_dir, config.run_dir)
    config = replace(config, **sections)
    assert trainer.train(config) == 0
    return config, [row["learning_rate"] for row in rows(config) if "loss" in row]


@pytest.fixture(scope="module")
def restarted(finished, tmp_path_factory):
    """The finished run up to step 8, with a second peak."""
    return longer(finished, tmp_path_factory.mktemp("restarted"), optim={"extend": "restart"})


@pytest.mark.slow
def test_a_longer_run_goes_from_the_rate_that_it_had_unless_asked_otherwise(finished, restarted, tmp_path, capsys):
    config, found = longer(finished, tmp_path / "a")
    assert found[4:] == pytest.approx([1e-3] * 4)
    assert "train.num_steps 4 -> 8: learning rate 0.001 at step 4 (optim.extend=continue" in capsys.readouterr().out
    written = load_config(Path(config.run_dir) / "config.yaml")
    assert written.optim.extended == ("continue at 4 of 4",)
    assert restarted[1][4] == pytest.approx(1e-2)
    _, stretched = longer(finished, tmp_path / "c", optim={"extend": "stretch"})
    assert stretched[4] == pytest.approx(1e-3 + 9e-3 * (1 + np.cos(np.pi * 4 / 8)) / 2)


def test_a_change_is_remembered_by_later_starts(restarted, tmp_path):
    longer_config, found = restarted
    config = replace(longer_config, run_dir=str(tmp_path / "run"))
    shutil.copytree(longer_config.run_dir, config.run_dir)
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / "00000008")
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / "00000007")
    assert trainer.train(config) == 0  # the same command, from step 6
    assert [row["learning_rate"] for row in rows(config) if "loss" in row] == found


def test_the_config_of_a_longer_run_repeats_it_from_the_start(restarted, tmp_path):
    config, found = restarted
    again = replace(load_config(Path(config.run_dir) / "config.yaml"), run_dir=str(tmp_path / "again"))
    assert trainer.train(again) == 0
    assert [row["learning_rate"] for row in rows(again) if "loss" in row] == pytest.approx(found, rel=1e-6)


@pytest.mark.slow
def test_a_change_in_the_part_that_does_not_decay_needs_no_note(finished, tmp_path):
    steady = {"schedule": "wsd"} | OPTIM
    config = run_config(tmp_path, optim=steady, train={"num_steps": 10, "eval_every": 0, "save_every": 2})
    assert trainer.train(config) == 0
    for step in (6, 8, 10):  # as if it had been killed after step 4, where the rate is still at its peak
        shutil.rmtree(Path(config.run_dir) / "checkpoints" / f"{step:08}")
    config = replace(config, train={"num_steps": 12})
    assert trainer.train(config) == 0
    assert load_config(Path(config.run_dir) / "config.yaml").optim.extended == ()
