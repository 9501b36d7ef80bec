"""Sinks: the real packages get the rows, and one that fails, hangs or is slow is no trouble to the run."""

import glob
import threading
import time
from pathlib import Path

import pytest

from gptjax.config.log import LogConfig
from gptjax.config.reader import read_flags
from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.report import sinks
from gptjax.report.sinks import Kind, SinkRun, Sinks, check_installed, values_of
from gptjax.training import trainer
from tests.tiny import run_config

ROWS = [
    {"step": 1, "loss": 4.0, "learning_rate": 1e-3, "skipped": 0},
    {"step": 2, "skip": {"reason": "the loss is a spike"}},
    {"step": 2, "loss": None, "learning_rate": 5e-4, "skipped": 1},
    {"step": 2, "val_loss": 3.5, "perplexity": 33.1},
]


def run_of(folder: Path, first_step: int = 0, identity: str = "abcdef012345") -> SinkRun:
    return SinkRun(folder, identity, first_step, "trials", {"seed": 3, "data.path": ["a", "b"]})


def send(name: str, run: SinkRun, rows=ROWS) -> list[str]:
    """Sends rows to a sink; returns what was reported."""
    reported: list[str] = []
    sink = Sinks((name,), run, reported.append)
    for row in rows:
        sink.write(row)
    sink.close()
    return reported


class Fake:
    """A sink that does what a test asks."""

    def __init__(self, on_write=lambda step: None, on_close=lambda: None):
        self.on_write, self.on_close, self.rows = on_write, on_close, []

    def write(self, step, values):
        self.on_write(step)
        self.rows.append((step, values))

    def close(self):
        self.on_close()


def use(monkeypatch, open_sink) -> None:
    monkeypatch.setitem(sinks.SINKS, "wandb", Kind("json", open_sink))


def test_rows_have_the_names_that_people_look_for():
    assert values_of(ROWS[0]) == {"train/loss": 4.0, "train/learning_rate": 1e-3, "train/skipped": 0.0}
    assert values_of(ROWS[1]) == {}
    assert values_of(ROWS[2]) == {"train/learning_rate": 5e-4, "train/skipped": 1.0}, "NaN was written as null"
    assert values_of(ROWS[3]) == {"validation/loss": 3.5, "validation/perplexity": 33.1}


@pytest.mark.parametrize("name", sinks.SINKS)
def test_the_options_turn_sinks_on(name):
    assert read_flags(Config, [f"--log.{name}"]) == {"log": {name: True}}, "--log.wandb is --log.wandb true"
    tensorboard, wandb, trackio, mlflow = (name == n for n in ("tensorboard", "wandb", "trackio", "mlflow"))
    assert LogConfig(tensorboard=tensorboard, wandb=wandb, trackio=trackio, mlflow=mlflow).sinks == (name,)


def test_a_package_that_is_missing_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sinks.SINKS, "wandb", Kind("no_such_package", Fake))
    with pytest.raises(UserError, match=r"log.wandb=True needs .* no_such_package: pip install 'gptjax\[wandb"):
        check_installed(LogConfig(wandb=True))
    config = run_config(tmp_path, log={"wandb": True})
    with pytest.raises(UserError, match="no_such_package"):
        trainer.train(config)
    assert not Path(config.run_dir).exists()


def test_a_sink_that_fails_is_reported_once_and_its_rows_are_counted(tmp_path, monkeypatch):
    def refuse(_run):
        raise ConnectionError("no\nroute")

    use(monkeypatch, refuse)
    reported = send("wandb", run_of(tmp_path), ROWS * 3)
    assert reported == [
        "log.wandb: stopped: ConnectionError: no route; training continues",
        "log.wandb: 9 rows were not sent; metrics.jsonl has them all",
    ]

    def fail_at_second(step):
        if step == 2:
            raise SystemExit

    use(monkeypatch, lambda run: Fake(fail_at_second))
    assert send("wandb", run_of(tmp_path))[-1] == "log.wandb: 2 rows were not sent; metrics.jsonl has them all"


def test_a_sink_that_hangs_holds_nobody_up(tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(sinks, "QUEUE_ROWS", 3)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.2)
    opened = threading.Event()

    def hang(_step):
        opened.set()
        released.wait(30)

    use(monkeypatch, lambda run: Fake(hang))
    reported: list[str] = []
    sink = Sinks(("wandb",), run_of(tmp_path), reported.append)
    sink.write(ROWS[0])
    assert opened.wait(10)
    began = time.monotonic()
    for _ in range(10):  # three wait, seven are dropped
        sink.write(ROWS[0])
    assert time.monotonic() - began < 5
    assert reported == ["log.wandb: 3 rows wait already; rows are dropped, training continues"]
    sink.close()
    released.set()
    assert "did not finish" in reported[1] and "10 rows were not sent" in reported[2]


def test_a_slow_sink_gets_every_row_before_the_end(tmp_path, monkeypatch):
    slow = Fake(lambda step: time.sleep(0.01))
    use(monkeypatch, lambda run: slow)
    assert send("wandb", run_of(tmp_path), [ROWS[0] | {"step": n} for n in range(50)]) == []
    assert [step for step, _ in slow.rows] == list(range(50))


def test_a_run_feeds_its_sinks_what_its_file_has(tmp_path, monkeypatch):
    runs, fakes = [], []

    def opened(run):
        runs.append(run)
        fakes.append(Fake())
        return fakes[-1]

    use(monkeypatch, opened)
    config = run_config(tmp_path, log={"wandb": True, "project": "mine"}, train={"num_steps": 3, "eval_every": 0})
    assert trainer.train(config) == 0
    assert [step for step, _ in fakes[0].rows] == [1, 2, 3, 3]
    assert "validation/loss" in fakes[0].rows[-1][1] and "train/loss" in fakes[0].rows[0][1]
    assert (runs[0].project, runs[0].options["log.wandb"], runs[0].first_step) == ("mine", True, 0)


def test_tensorboard_reads_the_values(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    assert send("tensorboard", run_of(tmp_path)) == []
    assert send("tensorboard", run_of(tmp_path, first_step=1), [ROWS[0] | {"step": 2}]) == []
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(glob.glob(str(tmp_path / "tensorboard" / "events*"))):
        content, at = Path(path).read_bytes(), 0
        while at < len(content):  # TFRecord: length, its checksum, data, its checksum
            length = int.from_bytes(content[at : at + 8], "little")
            events.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += length + 16
    values = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    assert values[1, "train/loss"] == 4.0 and values[2, "validation/loss"] == 3.5 and values[2, "train/loss"] == 4.0
    assert [e.step for e in events if e.session_log.status] == [2], "rows from before the resume are hidden"


def test_wandb_keeps_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    assert send("wandb", run_of(tmp_path)) == []
    [path] = tmp_path.glob("wandb/offline-run-*/run-abcdef012345.wandb")
    end = time.monotonic() + 30
    while b"trials" not in path.read_bytes() and time.monotonic() < end:  # wandb's own process writes it
        time.sleep(0.1)
    content = path.read_bytes()
    assert b"validation/loss" in content and b"3.5" in content and b"trials" in content


def test_sinks_get_the_project(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="needs the extra trackio")
    import sqlite3

    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "db", raising=False)
    log = LogConfig(trackio=True, project="trials")
    run = SinkRun(tmp_path, "abcdef012345", 0, log.project, {"seed": 3})
    assert send("trackio", run) == []
    [database] = (tmp_path / "db").glob("*.db")
    assert database.stem == log.project
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in rows] == [1, 2, 2] and "4.0" in str(rows[0][1])


def test_mlflow_has_one_run_for_a_run_that_resumes(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for first_step in (0, 2):
        assert send("mlflow", run_of(tmp_path, first_step)) == []
    client = mlflow.MlflowClient()
    [experiment] = [e for e in client.search_experiments() if e.name == "trials"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params["seed"] == "3" and run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 1]
