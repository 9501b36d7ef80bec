"""Functions of the user's own: rows, loss and metric by import path."""

import json
from pathlib import Path

import numpy as np
import pytest

from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import Predictions
from gptjax.report.metrics import read_metrics
from gptjax.tasks.functions import metric_values
from gptjax.tasks.registry import parse
from gptjax.text.formats import Row
from gptjax.training import trainer
from tests.tiny import replace, run_config

CODE = """
import jax.numpy as jnp

def read(row):
    if row.get("rating") == "":
        return None
    return {"text": row["review"]} | ({"label": float(row["rating"].split(" of ")[0])} if "rating" in row else {})

def thrice(outputs, targets):
    return 3 * jnp.square(outputs - targets).mean(axis=-1)

def whole(outputs, targets):
    return jnp.square(outputs - targets).mean()

def largest(predicted, truth):
    return max(abs(p - t) for p, t in zip(predicted, truth, strict=True))

def share(predicted, truth):
    return {"share": sum(p == t for p, t in zip(predicted, truth, strict=True)) / len(truth)}

def broken(*values):
    return 1 / 0

def text(*values):
    return "good"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of functions whose name no other test has imported."""
    (tmp_path / f"mine_{tmp_path.name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(folder: Path, function: str) -> str:
    return f"mine_{folder.name}:{function}"


@pytest.mark.slow
def test_functions_of_the_user_read_rows_weigh_errors_and_score(folder, capsys):
    rows = [{"review": f"text {n}", "rating": f"{n % 5} of 5" if n % 7 else ""} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for loss in ("", named(folder, "thrice")):
        task = TaskConfig(
            kind="regress", rows=named(folder, "read"), loss=loss, metric=named(folder, "largest"),
        )  # fmt: skip
        config = run_config(folder, run_dir=str(folder / f"run{bool(loss)}"))
        train = {"num_steps": 1, "eval_windows": 512, "eval_every": 1, "save_every": 0, "best_by": "metric"}
        config = replace(config, task=task, train=train, data={"path": ("rows.jsonl",), "validation_fraction": 0.3})
        assert trainer.train(config) == 0
        assert "6 left out by the function of task.rows" in capsys.readouterr().out
        first, measured = read_metrics(Path(config.run_dir))
        losses[bool(loss)] = first["loss"]
        assert 0 < measured["metric"] < 5
        assert main(["evaluate", "--run_dir", config.run_dir]) == 0
        assert f"metric {measured['metric']:.4f}" in capsys.readouterr().out
    assert losses[True] == pytest.approx(3 * losses[False], rel=1e-5)
    (folder / "new.jsonl").write_text('{"review": "text"}\n')
    assert main(["predict", "--run_dir", config.run_dir, "--file", "new.jsonl"]) == 0
    assert "predicted" in capsys.readouterr().out


def test_a_metric_sees_names_and_may_return_several_scores(folder):
    found = Predictions(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]), ("x", "y"))
    assert found.named() == (["x", "y"], ["x", "x"])
    assert metric_values(TaskConfig(kind="classify", metric=named(folder, "share")), found) == {"share": 0.5}
    several = Predictions(np.array([[0.9, 0.8]]), np.array([[0, 1]]), ("x", "y"))
    assert several.named() == ([["x", "y"]], [["y"]])
    words = Predictions(np.eye(2)[[0, 1, 1]], np.array([0, 1, 0]), ("x", "y"), sentences=(1, 2))
    assert words.named() == ([["x"], ["y", "y"]], [["x"], ["y", "x"]])


def test_wrong_functions_are_named(folder):
    found = Predictions(np.eye(2), np.array([0, 0]), ("x", "y"))
    for function, message in {
        "broken": r"task.metric='mine_\w+:broken' raised ZeroDivisionError: division by zero \(.*mine_\w+.py:\d+\)",
        "text": r"returned 'metric': 'good'; must return a finite number",
        "none": r"mine_\w+ has no function 'none'",
    }.items():
        with pytest.raises(UserError, match=message):
            metric_values(TaskConfig(kind="classify", metric=named(folder, function)), found)
    with pytest.raises(UserError, match=r"task.metric='no_such_file:f': no_such_file cannot be imported from .*No mod"):
        metric_values(TaskConfig(kind="classify", metric="no_such_file:f"), found)
    with pytest.raises(UserError, match=r"task.metric='file.py' must be module:function"):
        TaskConfig(kind="classify", metric="file.py")
    task = TaskConfig(kind="regress", rows=named(folder, "text"))
    with pytest.raises(UserError, match=r"r:4: task.rows='.*' returned a str; must return a dict"):
        list(parse([Row({"text": "a"}, "r:4")], task, DataConfig()))
