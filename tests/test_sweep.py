"""Sweeps: the runs are those that the file asks for, finished ones are left alone, and failures stop nothing."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gptjax.cli import main
from gptjax.config.reader import load_config, to_yaml
from gptjax.config.sweep import load_sweep
from gptjax.errors import UserError
from gptjax.report import html
from gptjax.report.charts import parallel_axes
from gptjax.report.record import read_record
from gptjax.verbs.sweep import train_all
from tests.faults.inputs import refused
from tests.test_report import Page, write_run
from tests.tiny import CONFIG, replace

DRAWN = "method: random\nruns: 2\noptions:\n "
BASE = "run_dir: ignored\ntrain: {num_steps: 20}\noptim: {min_learning_rate: 0}\n"


def write(folder: Path, text: str) -> Path:
    (folder / "base.yaml").write_text(BASE)
    path = folder / "sweep.yaml"
    path.write_text(f"config: {folder / 'base.yaml'}\nrun_dir: {folder / 'sweep'}\n{text}")
    return path


def test_a_grid_is_all_combinations_and_keeps_its_names(tmp_path):
    text = "options:\n  optim.learning_rate: [1e-3, 2e-3]\n  train.batch_size: [4, 8, 16]\n"
    sweep = load_sweep(write(tmp_path, text), {"seed": 5})
    got = {(run.config.optim.learning_rate, run.config.train.batch_size) for run in sweep.runs}
    assert got == {(rate, size) for rate in (1e-3, 2e-3) for size in (4, 8, 16)}
    assert all(run.config.seed == 5 and run.config.run_dir == str(tmp_path / "sweep" / run.name) for run in sweep.runs)
    more = load_sweep(write(tmp_path, text.replace("16]", "16, 32]").replace("1e-3", "3e-3, 1e-3")), {})
    assert {run.name for run in sweep.runs} < {run.name for run in more.runs}


def test_runs_may_start_from_the_run_of_the_base_config(tmp_path):
    path = write(tmp_path, "options:\n  optim.learning_rate: [1e-3, 2e-3]\n")
    (tmp_path / "base.yaml").write_text(BASE + "init_from: ignored\n")
    assert {run.config.init_from for run in load_sweep(path, {}).runs} == {"ignored"}


def test_random_draws_are_in_range_spread_by_scale_and_stay_when_runs_are_added(tmp_path):
    text = "method: random\nruns: {}\noptions:\n  optim.learning_rate: {{min: 1e-5, max: 1e-2, scale: log}}\n" \
        "  train.batch_size: {{min: 4, max: 64}}\n  optim.name: [adamw, lion]\n"  # fmt: skip
    few, many = (load_sweep(write(tmp_path, text.format(n)), {}).runs for n in (30, 200))
    assert [run.name for run in few] == [run.name for run in many][:30]
    rates = [run.config.optim.learning_rate for run in many]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert 0.25 < sum(rate < 10**-4 for rate in rates) / 200 < 0.42, "a third of the decades"
    assert {run.config.optim.name for run in many} == {"adamw", "lion"}
    assert all(type(run.options["train.batch_size"]) is int for run in many)
    assert math.isclose(sum(run.config.train.batch_size for run in many) / 200, 34, rel_tol=0.15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("options: {optim.lr: [1]}", "unknown option 'optim.lr'"),
        ("options: {seed: 3}", "seed must be a list"),
        ("options: {optim.learning_rate: [-1]}", "must not be negative"),
        ("runs: 3\noptions: {seed: [1]}", "runs has no effect with method: grid"),
        ("method: random\noptions: {seed: [1]}", "runs=0 must be"),
        ("method: random\nruns: 2\noptions: {seed: {min: 3, max: 1}}", "min < max"),
        ("method: bayes\noptions: {seed: [1]}", "must be grid or random"),
        ("option: {seed: [1]}", "unknown key 'option'. Did you mean 'options'?"),
        ("options: {run_dir: [a]}", "unknown option 'run_dir'"),
        ("options: {seed: [1, 2, 1]}", "seed=1 is the same run twice"),
        ("options: {optim.learning_rate: [1e-3, 0.001]}", "optim.learning_rate=0.001 is the same run twice"),
        ("options: {seed: [{}]}", "seed={} must be a whole number"),
        (f"{DRAWN} seed: {{min: 1, max: .inf}}", "min=1 and max=inf must be numbers"),
        (f"{DRAWN} train.ema: {{min: true, max: 3}}", "min=True and max=3 must be numbers"),
        (f"{DRAWN} seed: {{min: 0.2, max: 0.4}}", "min=0.2 and max=0.4 must be whole numbers"),
        (f"{DRAWN} optim.name: {{min: 1, max: 3}}", "optim.name is no number"),
        (f"{DRAWN} data.path: {{min: 1, max: 3}}", "data.path is no number"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message, capsys):
    assert message in refused(capsys, "sweep", write(tmp_path, text))
    with pytest.raises(UserError):
        load_sweep(tmp_path / "base.yaml", {})


@pytest.mark.parametrize("flags", [("--run_dir", "x"), ("--seed", "3")], ids=" ".join)
def test_a_flag_that_the_file_overrules_is_refused(tmp_path, capsys, flags):
    line = refused(capsys, "sweep", write(tmp_path, "options: {seed: [1, 2]}"), *flags)
    assert f"{flags[0]} has no effect" in line and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("key", ["config", "run_dir"])
def test_places_are_text(tmp_path, capsys, key):
    path = write(tmp_path, "options: {seed: [1]}")
    path.write_text(path.read_text().replace(f"{key}: ", f"{key}: 3 # "))
    assert f"{key}=3 must be text" in refused(capsys, "sweep", path)


def test_draws_that_are_equal_are_one_run_and_counted(tmp_path):
    sweep = load_sweep(write(tmp_path, "method: random\nruns: 9\noptions: {seed: [1, 2]}"), {})
    assert len(sweep.runs) == 2 and sweep.repeated == 7


def test_a_finished_run_of_another_config_is_not_taken_for_this_one(tmp_path):
    path, trained = write(tmp_path, "options: {seed: [1]}"), []

    def train(run, folder):
        trained.append(run.config.train.num_steps)
        (folder / f"{run.name}.yaml").write_text(to_yaml(run.config))
        shutil.rmtree(folder / run.name, ignore_errors=True)
        write_run(folder / run.name, run.config.train.num_steps, run.config)
        return 0

    assert train_all(load_sweep(path, {}), 1, train) == train_all(load_sweep(path, {}), 1, train) == 0
    assert trained == [20]
    with pytest.raises(UserError, match=r"was trained with optim.beta2=0.95, now optim.beta2=0.9; give the sweep"):
        train_all(load_sweep(path, {"optim": {"beta2": 0.9}}), 1, train)
    assert train_all(load_sweep(path, {"train": {"num_steps": 40}, "log": {"by_layer": True}}), 1, train) == 0
    assert trained == [20, 40], "a longer run is not finished"


def test_finished_runs_are_left_alone_and_failures_are_listed(tmp_path, capsys):
    sweep = load_sweep(write(tmp_path, "options: {seed: [1, 2, 3]}"), {})
    trained = []

    def train(run, folder):
        trained.append(run.options["seed"])
        if run.options["seed"] == 2:
            return 3
        loss = run.options["seed"] / 10
        write_run(folder / run.name, config=run.config, loss=lambda n: loss)
        return 0

    assert train_all(sweep, 1, train) == 1
    assert trained == [1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 runs, 0 of them finished before"
    rows = [line.split() for line in lines[-5:-2]]
    assert [row[0] for row in rows] == ["1", "3", "2"] and rows[0][1:] == ["0.6000", "10", "finished"]
    assert rows[2][-2:] == ["failed", "(3)"] and lines[-1] == str(tmp_path / "sweep" / "report.html")
    losses = [float(rows[n][1]) for n in (0, 1)]
    expected = f"2 runs over seed: val loss {np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
    assert lines[-2].startswith(expected)
    trained.clear()
    assert train_all(sweep, 2, train) == 1 and trained == [2]


def test_a_signal_stops_the_sweep_and_a_run_cut_short_is_not_finished(tmp_path, capsys):
    sweep = load_sweep(write(tmp_path, "options: {seed: [1, 2]}"), {})

    def train(run, folder):
        write_run(folder / run.name, steps=10, config=run.config)
        return 130

    assert train_all(sweep, 1, train) == 130
    captured = capsys.readouterr()
    assert "not finished" in captured.out and "continues the sweep" in captured.err
    assert len(list((tmp_path / "sweep").glob("*/metrics.jsonl"))) == 1, "the second one was not started"
    [path] = (tmp_path / "sweep").glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert max(row["step"] for row in rows) == 10


def test_a_slurm_array_has_a_task_for_each_run_that_is_not_finished(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "options: {seed: [1, 2, 3]}")
    sweep = load_sweep(path, {})
    write_run(tmp_path / "sweep" / sweep.runs[1].name, config=sweep.runs[1].config)
    assert main(["sweep", str(path), "--slurm", "--parallel", "2"]) == 0
    job = tmp_path / "sweep" / "array.sbatch"
    assert capsys.readouterr().out.splitlines() == ["3 runs, 1 of them finished before", f"sbatch {job}"]
    assert "#SBATCH --array=0-1%2\n" in job.read_text()
    (tmp_path / "srun").write_text('#!/bin/sh\nshift 4\necho "$1"\n')  # python -m gptjax train CONFIG
    (tmp_path / "srun").chmod(0o755)
    started = []
    for task in "01":
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(["bash", str(job)], env=environment, capture_output=True, text=True, check=True)
        started.append(load_config(done.stdout.strip()))
    assert [config.seed for config in started] == [1, 3]
    assert [config.run_dir for config in started] == [sweep.runs[n].config.run_dir for n in (0, 2)]


def test_a_comparison_has_parallel_coordinates_of_what_differs(tmp_path):
    records = []
    for n, (rate, name) in enumerate([(1e-3, "adamw"), (2e-3, "lion"), (4e-3, "adamw")]):
        config = replace(CONFIG, optim={"learning_rate": rate, "min_learning_rate": 0.0, "name": name})
        records.append(read_record(write_run(tmp_path / str(n), config=config, loss=lambda _, n=n: 1.0 + n)))
    axes = {axis.name: axis.values for axis in parallel_axes(records)}
    assert axes == {
        "optim.learning_rate": [1e-3, 2e-3, 4e-3],
        "optim.name": ["adamw", "lion", "adamw"],
        "best validation loss": [1.5, 2.5, 3.5],
    }
    assert parallel_axes(records[:2]) == []
    page = Page(html.render(records))
    assert [axis["name"] for axis in page.data["parallel"]] == list(axes) and ("id", "parallel") in page.attributes
    for n in range(3, 8):
        config = replace(CONFIG, optim={"learning_rate": n * 1e-3})
        records.append(read_record(write_run(tmp_path / str(n), config=config, loss=lambda _, n=n: 0.1 * n)))
    text = Page(html.render(records)).text
    assert "8 runs" in text and "Samples of" not in text, "many runs are a table"
    assert text.index("0.8000") < text.index("0.9000") < text.index("1.5000") < text.index("3.5000"), "the best first"
