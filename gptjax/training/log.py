"""Writes the metrics of a run to its file and shows them on the screen."""

import contextlib
import dataclasses
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import xxhash

from gptjax import __version__
from gptjax.config.reader import to_flat
from gptjax.config.start import Origin
from gptjax.config.train import TrainConfig
from gptjax.parallel import cluster
from gptjax.report import cost
from gptjax.report.events import add_event, read_events
from gptjax.report.metrics import MetricsFile, Nowhere
from gptjax.report.progress import Progress
from gptjax.report.reference import find_reference
from gptjax.report.sinks import SinkRun, Sinks
from gptjax.training.by_layer import group_names
from gptjax.training.parts import Parts
from gptjax.training.step import TrainState, is_logged
from gptjax.training.watch import REASONS

WATCHED = ("verdict", "in_a_row", "loss", "grad_norm")


class Log:
    """Metrics on their way to file and screen. A step's metrics are fetched after the next step was dispatched, so
    that the device never waits for the host; those of steps that are not logged are fetched with the next logged one.
    """

    def __init__(self, parts: Parts, state: TrainState, first: int):
        config = parts.config
        self._parts = parts
        self._noted: list[tuple[int, dict, bool]] = []
        self._clock = (first, time.monotonic())
        whole = not config.heads and config.finetune.train == "all"
        flops = cost.flops_per_token(config.model, state.params) if whole else 0.0
        peak = cost.peak_flops() if whole else None
        self._costs = {"flops_per_token": flops, "peak_flops": peak}
        self._reference = find_reference(config, parts.task.data_hash)
        self.progress = Progress(
            config.train.num_steps,
            first,
            evaluations_after=lambda step: evaluations_after(config.train, step),
            evaluation_batches=parts.task.evaluation_batches,
            step_batches=config.train.batch_size // config.train.micro_batch,
            flops_per_token=flops,
            peak_flops=peak,
            name=str(parts.run_dir),
            reference=self._reference,
        )
        self.file = MetricsFile(parts.run_dir, first, self.progress.line) if cluster.is_first() else Nowhere()
        self._waited = 0.0
        self._groups = group_names(state.params, config.model.n_layer)
        self._sinks: Sinks | None = None
        self.in_a_row = 0
        """Steps in a row that made no update, as of the newest that was fetched."""
        self.skips: list[dict] = []
        """Step, reason, loss, gradient norm and documents of each, the newest last."""

    def started(self, step: int, facts: list[tuple[str, str]], origin: Origin | None) -> None:
        """Records the start or the resume of the run, with the facts that were printed and the versions used."""
        known = {"data": self._parts.data} | ({} if self._reference is None else {"reference": self._reference.preset})
        known |= {} if origin is None else {"origin": dataclasses.asdict(origin)}
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
        versions = {"gptjax": __version__, "python": platform.python_version(), **versions}
        self.event("resume" if step else "start", step, facts=facts, versions=versions, **self._costs, **known)
        self._open_sinks(step)

    def event(self, name: str, step: int, **facts: Any) -> None:
        """See `add_event`; only the first process records events."""
        if cluster.is_first():
            add_event(self._parts.run_dir, name, step, self.progress.line, **facts)

    def write(self, row: dict) -> None:
        """Writes a row to the file and hands it to the sinks."""
        self.file.write(row)
        if self._sinks is not None:
            self._sinks.write(row)

    def note(self, step: int, metrics: dict, due: bool) -> None:
        """Takes the metrics of a step, which may not be computed yet; `due`: they are to be logged."""
        self._noted.append((step, metrics, due))

    def flush(self, everything: bool = False) -> None:
        """Fetches, writes and shows the metrics taken so far, if some of them are due or `everything` is true."""
        if not self._noted or not (everything or any(due for *_, due in self._noted)):
            return
        noted, self._noted = self._noted, []
        fetched = jax.device_get([metrics if due else {k: metrics[k] for k in WATCHED} for _, metrics, due in noted])
        for (step, _, due), arrays in zip(noted, fetched, strict=True):
            layers = arrays.pop("by_layer", None)
            values = {name: array.item() for name, array in arrays.items()}
            verdict, self.in_a_row = values.pop("verdict"), values.pop("in_a_row")
            if verdict in REASONS:
                self._skip(step, REASONS[verdict], values)
            if due:
                self._row(step, values)
            if layers is not None and is_logged(self._parts.config, step):
                self.by_layer(
                    step, {name: dict(zip(self._groups, array.tolist(), strict=True)) for name, array in layers.items()}
                )

    def by_layer(self, step: int, numbers: dict[str, dict[str, float]]) -> None:
        """Writes numbers of each layer, by quantity and by layer."""
        self.write({"step": step, "by_layer": numbers})

    def evaluation(self, step: int, batches: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """See `Progress.evaluation`."""
        return self.progress.evaluation(step, batches)

    @contextlib.contextmanager
    def data_wait(self):
        """Counts the time inside as waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def restart_clock(self) -> None:
        """Leaves the time since the last logged step out of tokens/s."""
        self._clock, self._waited = (self._clock[0], time.monotonic()), 0.0

    def close(self) -> None:
        """Closes file and screen."""
        self.progress.close()
        if self._sinks is not None:
            self._sinks.close()
        self.file.close()

    def _open_sinks(self, step: int) -> None:
        config, run_dir = self._parts.config, self._parts.run_dir
        if not config.log.sinks or not cluster.is_first():
            return
        starts = [event["time"] for event in read_events(run_dir)[0] if event["event"] == "start"]
        identity = xxhash.xxh3_64_hexdigest(f"{run_dir.resolve()} {starts[-1:]}".encode())
        run = SinkRun(run_dir, identity, step, config.log.project, to_flat(config))
        self._sinks = Sinks(config.log.sinks, run, self.progress.line)

    def _row(self, step: int, values: dict) -> None:
        now, (last_step, last_time) = time.monotonic(), self._clock
        seconds = max(now - last_time, 1e-9)
        tokens = self._parts.tokens_before(step)
        speed = (tokens - self._parts.tokens_before(last_step)) / seconds
        row = {"step": step, **values, "tokens": tokens, "tokens_per_s": round(speed, 1)}
        self._clock = (step, now)
        self.write(row)
        self.progress.step(row, min(1.0, self._waited / seconds), memory_in_use())
        self._waited = 0.0

    def _skip(self, step: int, reason: str, values: dict) -> None:
        """Reports a step that made no update, with the documents of its batch."""
        documents = self._parts.task.windows.documents(step - 1, self._parts.config.train.batch_size)
        skip = {"reason": reason, "loss": values["loss"], "grad_norm": values["grad_norm"], "documents": documents}
        self.write({"step": step, "skip": skip})
        low, high = min(first for first, _ in documents), max(last for _, last in documents)
        self.progress.line(
            f"step {step} · no update: {reason} (loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g},"
            f" documents {low} to {high})"
        )
        self.skips = [*self.skips, {"step": step, **skip}][-self._parts.config.train.max_skipped_in_a_row :]


def memory_in_use() -> int:
    """Bytes in use on the first device; on a CPU the largest amount that the process had; 0: unknown."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics:
        return statistics.get("bytes_in_use", 0)
    try:
        import resource
    except ImportError:  # as on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def evaluations_after(train: TrainConfig, step: int) -> int:
    """Evaluations after `step` until the end of the run, which has one itself."""
    if not train.eval_every:
        return int(step < train.num_steps)
    regular = (train.num_steps - 1) // train.eval_every - step // train.eval_every
    return max(0, regular) + int(step < train.num_steps)
