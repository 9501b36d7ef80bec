"""Properties of whole runs: which steps are saved, what a manifest says, what survives a resume, what is evaluated."""

import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoints.checkpoint import Checkpoints
from gptjax.checkpoints.choice import choose
from gptjax.checkpoints.manifest import read_manifest
from gptjax.checkpoints.run_dir import load_run
from gptjax.evaluation.loss import Evaluation
from gptjax.tasks import pretrain
from gptjax.training import selftest, trainer
from tests.tiny import final_state, rows, run_config


def saved_losses(run_dir: Path) -> dict[int, float | None]:
    """The validation loss of each checkpoint, by its step."""
    manifests = [read_manifest(path) for path in sorted((run_dir / "checkpoints").iterdir())]
    return {manifest.step: manifest.val_loss for manifest in manifests}


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(losses)`: evaluations of the runs that follow find these validation losses, one after another."""

    def script(losses):
        losses = iter(losses)
        monkeypatch.setattr(pretrain, "measure", lambda *_: Evaluation(next(losses), 1.0, 1.0))

    return script


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("losses", [[3, 1, 2, None, 2.5, 4], [None, None, 5, 5, 5], [5, 4, 3, 2]], ids=str)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, losses):
    checkpoints = Checkpoints(tmp_path, keep)
    for step, loss in enumerate(losses, 1):
        checkpoints.save_items(step, {"params": {"w": jnp.zeros(2)}}, {}, loss)
        checkpoints.wait()
        known = {n: value for n, value in enumerate(losses[:step], 1) if value is not None}
        best = {min(known, key=lambda n: (known[n], n))} if known else set()
        assert set(saved_losses(tmp_path)) == set(range(max(1, step - keep + 1), step + 1)) | best
    checkpoints.close()
    chosen = choose(tmp_path / "checkpoints", "best", strict=True).manifest
    assert chosen is not None
    assert chosen.val_loss == min(known.values())


def test_every_new_best_is_saved_and_each_manifest_has_the_loss_of_its_own_step(tmp_path, scripted):
    scripted([5.0, 5.0, 7.0])
    config = run_config(tmp_path, train={"eval_every": 2, "save_every": 3})
    assert trainer.train(config) == 0
    assert {row["step"]: row["val_loss"] for row in rows(config) if "val_loss" in row} == {2: 5.0, 4: 5.0, 6: 7.0}
    # A new best at step 2 (an equal loss is none), every third step, the last; a step without evaluation has no loss.
    assert saved_losses(Path(config.run_dir)) == {2: 5.0, 3: None, 6: 7.0}


def test_best_loss_and_patience_survive_a_resume(tmp_path, scripted, capsys):
    losses = [2.0, 3.0, 2.9, 2.8, 2.7]  # never better than the first: patience 3 ends the run at the fourth
    config = run_config(tmp_path, train={"eval_every": 1, "save_every": 1, "patience": 3, "keep_checkpoints": 2})
    scripted(losses)
    assert trainer.train(config) == 0
    assert "stopped at step 4 (no better loss in 3 evaluations)" in capsys.readouterr().out
    expected = rows(config)
    assert [row["step"] for row in expected if "val_loss" in row] == [1, 2, 3, 4]
    assert list(saved_losses(Path(config.run_dir))) == [1, 3, 4], "the best, and the newest two"
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / "00000004")  # as if it had been killed in its fourth step
    scripted(losses[3:])
    assert trainer.train(config) == 0
    assert "(best)" not in capsys.readouterr().out
    assert rows(config) == expected


def test_what_is_measured_and_computed_at_once_is_what_the_config_says(tmp_path, monkeypatch):
    seen, shapes = [], []

    def measure(eval_step, params, batches, *_):
        seen.append(np.asarray(params["embed"]["tokens"]))
        shapes.append({batch.inputs.shape for batch in batches})
        return Evaluation(1.0, math.e, 1.0)

    monkeypatch.setattr(pretrain, "measure", measure)
    compile_safely = selftest.compile_safely
    monkeypatch.setattr(
        selftest,
        "compile_safely",
        lambda lowered: shapes.append({leaf.shape for leaf in lowered.in_avals[0][1]}) or compile_safely(lowered),
    )
    train = {"batch_size": 8, "micro_batch_size": 4, "ema": 0.9, "sample_tokens": 4, "sample_prompt": ">"}
    config = run_config(tmp_path, cache_dir=str(tmp_path / "cache"), model={"dropout": 0.2}, train=train)
    assert trainer.train(config) == 0
    assert shapes == [{(2, 4, 32)}, {(4, 32)}, {(4, 32)}]
    assert [row["tokens"] for row in rows(config) if "loss" in row] == [8 * 32 * step for step in range(1, 7)]
    assert len(list((tmp_path / "cache" / "data").glob("*/manifest.json"))) == 1
    [_, *samples] = (Path(config.run_dir) / "samples.txt").read_bytes().split(b"--- step ")
    assert [len(sample.partition(b"\n>")[2].decode()) - 1 for sample in samples] <= [4, 4]
    # The average is what a run is judged by, and what is loaded of it.
    state, _ = final_state(config)
    np.testing.assert_array_equal(seen[-1], state.ema["embed"]["tokens"])
    assert not np.array_equal(seen[-1], state.params["embed"]["tokens"])
    np.testing.assert_array_equal(load_run(Path(config.run_dir), "latest").params["embed"]["tokens"], seen[-1])
