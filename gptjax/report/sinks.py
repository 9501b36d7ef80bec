"""Sends a run's metrics to other programs: TensorBoard, Weights & Biases, trackio, MLflow.

Each sink runs in its own thread with a bounded queue. A sink that fails, hangs or is slow neither stops nor slows
training: rows that do not fit in the queue are dropped, counted and reported.

To add a sink: write a function that opens it, add it to `SINKS`, an option to `config/log.py`, an extra to
`pyproject.toml`, and a test against the real package.
"""

import contextlib
import dataclasses
import importlib.util
import math
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gptjax.config.log import LogConfig
from gptjax.errors import UserError
from gptjax.report.record import is_number

QUEUE_ROWS = 1000
"""Size of a sink's queue; further rows are dropped."""
CLOSE_SECONDS = 20.0
"""Seconds that the end of a run waits for all sinks together."""


@dataclasses.dataclass(frozen=True)
class SinkRun:
    """The description of the run for sinks."""

    run_dir: Path
    identity: str
    """Hexadecimal id of the run. A resumed run keeps its id."""
    first_step: int
    """Number of steps before this start."""
    project: str
    options: dict[str, Any]
    """The config, by dotted names."""

    @property
    def name(self) -> str:
        """The display name of the run."""
        return self.run_dir.resolve().name


class Sink(Protocol):
    """The interface of a sink."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Sends the values of a step, with names such as `train/loss`."""
        ...

    def close(self) -> None:
        """Sends the remaining values."""
        ...


class Kind(NamedTuple):
    """A kind of sink."""

    package: str
    """The Python package of the sink; the extra has the sink's name."""
    open: Callable[[SinkRun], Sink]


def check_installed(log: LogConfig) -> None:
    """Checks before a run that the packages of its sinks are installed.

    Raises:
        UserError: A package is missing; the message names the extra.
    """
    for name in log.sinks:
        if importlib.util.find_spec(SINKS[name].package) is None:
            raise UserError(f"log.{name}=True needs the package {SINKS[name].package}: pip install 'gptjax[{name}]'")


def values_of(row: dict) -> dict[str, float]:
    """The numbers of a metrics row under their names in sinks: `train/loss`, `validation/loss`.

    The row of a skipped step has none; the next logged row counts it in `train/skipped`. Names of numbers of layers are
    such as `grad_norm/layer_0`.
    """
    layers = row.get("by_layer", {})
    if layers:
        numbers = {f"{quantity}/{layer}": value for quantity, of in layers.items() for layer, value in of.items()}
        return {name: float(value) for name, value in numbers.items() if is_number(value) and math.isfinite(value)}
    evaluated = "val_loss" in row
    named = {("loss" if name == "val_loss" else name): value for name, value in row.items() if name != "step"}
    group = "validation" if evaluated else "train"
    return {f"{group}/{name}": float(value) for name, value in named.items() if is_number(value)}


class Sinks:
    """All sinks of a run. None of its methods raises or waits, except `close`, which waits for `CLOSE_SECONDS`."""

    def __init__(self, names: tuple[str, ...], run: SinkRun, notify: Callable[[str], None] = print):
        self._threads = [_SinkThread(name, SINKS[name], run, notify) for name in names]

    def write(self, row: dict) -> None:
        """Puts a row into the queue of every sink."""
        values = values_of(row)
        for thread in self._threads if values else []:
            thread.put(row["step"], values)

    def close(self) -> None:
        """Waits for the sinks to finish, and reports those that lost rows."""
        end = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.finish()
        for thread in self._threads:
            thread.join_until(end)


class _SinkThread:
    def __init__(self, name: str, kind: Kind, run: SinkRun, notify: Callable[[str], None]):
        self._name, self._kind, self._run, self._notify = name, kind, run, notify
        self._queue: queue.Queue[tuple[int, dict] | None] = queue.Queue(QUEUE_ROWS)
        self._dropped, self._failed, self._ending = 0, False, threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: dict[str, float]) -> None:
        try:
            if self._failed:
                raise queue.Full
            self._queue.put_nowait((step, values))
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1 and not self._failed:
                self._notify(f"log.{self._name}: {QUEUE_ROWS} rows wait already; rows are dropped, training continues")

    def finish(self) -> None:
        self._ending.set()
        with contextlib.suppress(queue.Full):  # the thread also checks `_ending`
            self._queue.put_nowait(None)

    def join_until(self, end: float) -> None:
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._notify(f"log.{self._name}: did not finish in {CLOSE_SECONDS:.0f} s and is left behind")
            self._dropped += self._queue.qsize()
        if self._dropped:
            self._notify(f"log.{self._name}: {self._dropped} rows were not sent; metrics.jsonl has them all")

    def _work(self) -> None:
        taken = 0
        try:
            sink = self._kind.open(self._run)
            try:
                while not (self._ending.is_set() and self._queue.empty()):
                    item = self._queue.get()
                    if item is not None:
                        taken = 1
                        sink.write(*item)
                        taken = 0
            finally:
                sink.close()
        except BaseException as error:  # even SystemExit: a sink must not end a run
            self._failed = True
            self._dropped += taken + sum(item is not None for item in self._queue.queue)
            reason = " ".join(str(error).split())[:300]
            self._notify(f"log.{self._name}: stopped: {type(error).__name__}: {reason}; training continues")


class _TensorBoard:
    def __init__(self, run: SinkRun):
        from tensorboardX import SummaryWriter

        # TensorBoard hides rows of later steps, which were written before a resume.
        purge = run.first_step + 1 if run.first_step else None
        self._writer = SummaryWriter(
            str(run.run_dir / "tensorboard"), purge_step=purge, filename_suffix=f".{run.first_step}"
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: SinkRun):
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.identity,
            resume="allow",
            dir=str(run.run_dir),
            config=run.options,
            settings=wandb.Settings(console="off", silent=True),
        )
        # The step is logged as a metric, because wandb's own step must not decrease, as it does after a resume.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: SinkRun):
        import trackio

        name = f"{run.name}-{run.identity[:6]}"  # trackio identifies a run by its name
        self._run = trackio.init(
            project=run.project,
            name=name,
            config=run.options,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run: SinkRun):
        from mlflow import MlflowClient

        self._client = MlflowClient()
        known = self._client.get_experiment_by_name(run.project)
        experiment = known.experiment_id if known else self._client.create_experiment(run.project)
        tag = "gptjax.identity"
        earlier = self._client.search_runs([experiment], f"tags.`{tag}` = '{run.identity}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return
        self._id = self._client.create_run(experiment, run_name=run.name, tags={tag: run.identity}).info.run_id
        for name, value in run.options.items():
            self._client.log_param(self._id, name, str(value)[:500])

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


SINKS: dict[str, Kind] = {
    "tensorboard": Kind("tensorboardX", _TensorBoard),
    "wandb": Kind("wandb", _Wandb),
    "trackio": Kind("trackio", _Trackio),
    "mlflow": Kind("mlflow", _MLflow),
}
"""Sinks by the name of their option in section log."""
