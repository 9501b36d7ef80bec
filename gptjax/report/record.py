"""Reads the records in a run directory: metrics, events, samples, config."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from gptjax.config.reader import differing_fields, to_flat
from gptjax.config.run import Config
from gptjax.config.start import CONFIG_FILE, load_run_config
from gptjax.errors import UserError
from gptjax.report.events import read_events
from gptjax.report.metrics import METRICS_FILE, read_metrics

SAMPLES_FILE = "samples.txt"
_SAMPLE = re.compile(r"^--- step (\d+)\n", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The records of a run. Rows are those of `metrics.jsonl`, ordered by step."""

    name: str
    run_dir: Path
    config: Config
    steps: list[dict]
    """Rows of training steps, with `mfu` (a fraction) if the peak of the device is known."""
    evaluations: list[dict]
    layers: list[dict]
    """Rows with numbers of each layer under `by_layer`."""
    skips: list[dict]
    samples: list[tuple[int, str]]
    """Step and text (including the prompt); the last sample of each step."""
    events: list[dict]
    damaged_events: int = 0
    """Lines of `events.jsonl` that could not be read."""

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of the newest start or resume event; empty for runs without events."""
        return next((event for event in reversed(self.events) if event["event"] in ("start", "resume")), {})

    @property
    def origin(self) -> dict[str, Any] | None:
        """The config file that the run was started with, and the options in which they differ; None: unknown."""
        for event in reversed(self.events):
            origin = event["origin"] if isinstance(event.get("origin"), dict) else {}
            changed = origin.get("changed")
            if isinstance(changed, dict) and all(
                isinstance(pair, list) and len(pair) == 2 for pair in changed.values()
            ):
                return {"file": str(origin.get("file")), "changed": changed}
        return None

    @property
    def best(self) -> dict | None:
        """The evaluation with the lowest validation loss."""
        rows = [row for row in self.evaluations if is_number(row.get("val_loss"))]
        return min(rows, key=lambda row: row["val_loss"], default=None)


def read_record(run_dir: Path, name: str = "") -> RunRecord:
    """Reads a run directory; `name` is its display name, by default the folder's name.

    Raises:
        UserError: It is no run directory, has no metrics yet, or its metrics are damaged.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"{run_dir}: no run directory (it has no {CONFIG_FILE}); name the folder of a run")
    if not (run_dir / METRICS_FILE).is_file():
        raise UserError(f"{run_dir}: has no {METRICS_FILE} yet; an imported model has none, a run has it at step 1")
    rows = read_metrics(run_dir)
    events, damaged = read_events(run_dir)
    record = RunRecord(
        name=name or run_dir.resolve().name,
        run_dir=run_dir,
        config=load_run_config(run_dir),
        steps=[row for row in rows if "tokens_per_s" in row],
        evaluations=[row for row in rows if "val_loss" in row],
        layers=[row for row in rows if isinstance(row.get("by_layer"), dict)],
        skips=[row for row in rows if "skip" in row],
        samples=read_samples(run_dir / SAMPLES_FILE),
        events=events,
        damaged_events=damaged,
    )
    flops, peak = record.facts.get("flops_per_token"), record.facts.get("peak_flops")
    if is_number(flops) and isinstance(peak, int | float) and peak > 0:
        for row in record.steps:
            if is_number(row["tokens_per_s"]):
                row["mfu"] = row["tokens_per_s"] * flops / peak
    return record


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Steps and texts of `samples.txt`. Only the last text of each step: a resumed run can have written a step
    twice.
    """
    if not path.is_file():
        return []
    parts = _SAMPLE.split(path.read_bytes().decode("utf-8", "replace"))
    found = {int(step): text.removesuffix("\n") for step, text in zip(parts[1::2], parts[2::2], strict=True)}
    return sorted(found.items())


def names_of(run_dirs: list[Path]) -> list[str]:
    """Unique names of runs: their folders' names, or full paths if two names are equal."""
    short = [path.resolve().name for path in run_dirs]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, run_dirs, strict=True)]


def changed_options(config: Config) -> dict[str, tuple]:
    """Maps each option that differs from its default to `(default, value)`."""
    return differing_fields(Config(), config)


def options_that_differ(records: list[RunRecord]) -> dict[str, list]:
    """Maps each option that differs between runs to its values."""
    flats = [to_flat(record.config) for record in records]
    names = dict.fromkeys(name for flat in flats for name in flat)
    values = {name: [flat.get(name) for flat in flats] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def is_number(value: Any) -> bool:
    """Whether a value of a row is a number. NaN is null in the file."""
    return isinstance(value, int | float) and not isinstance(value, bool)
