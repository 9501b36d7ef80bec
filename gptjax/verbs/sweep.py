"""`gptjax sweep`: the same config with other options, run after run or a few at a time."""

import contextlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gptjax.config.reader import differing_fields, load_config, to_yaml
from gptjax.config.start import CONFIG_FILE
from gptjax.config.sweep import Sweep, SweepRun, load_sweep
from gptjax.config.verbs.sweep import SweepConfig
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.report.html import REPORT_FILE, write_report
from gptjax.report.metrics import METRICS_FILE
from gptjax.report.progress import notify
from gptjax.report.record import RunRecord, is_number, read_record

ARRAY_FILE = "array.sbatch"
STOPPED = {128 + number for number in (signal.SIGTERM, signal.SIGINT)}
"""Exit statuses of a run that a signal ended."""

REPEATED = ("task.fold", "seed")
"""Options whose runs repeat an experiment, so that their scores are averaged."""

MAY_CHANGE = ("run_dir", "cache_dir", "cluster.", "log.", "train.num_steps", "train.save_every", "train.log_every")
"""Options that may differ when a sweep continues: they do not change what a finished run has learned."""

Train = Callable[[SweepRun, Path], int]
"""Trains a run, given the folder of the sweep; returns the exit status."""


def run_sweep(path: str, options: SweepConfig, overrides: dict) -> int:
    """Trains the runs that are not finished, prints a table of all, and writes their comparison; status 1: some failed.
    With `slurm` it writes the job that trains them instead.

    Raises:
        UserError: The sweep's file or a config is wrong.
    """
    sweep = load_sweep(Path(path), overrides)
    if sweep.repeated:
        draws = sweep.repeated + len(sweep.runs)
        print(f"{sweep.repeated} of {draws} draws are equal to earlier ones and are left out")
    return write_array(sweep, options.parallel) if options.slurm else train_all(sweep, options.parallel, _train)


def write_array(sweep: Sweep, parallel: int) -> int:
    """Writes the configs of the runs that are not finished, and a SLURM array with a task for each; prints what to do.

    A task whose time ends gets SIGTERM two minutes before, saves, and resumes when the array is submitted again.
    """
    folder = Path(sweep.run_dir).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    waiting = _waiting(sweep, folder)
    if not waiting:
        print(f"all {len(sweep.runs)} runs are finished; without --slurm, the same command prints their table")
        return 0
    for run in waiting:
        _write_config(run, folder)
    configs = "\n".join(f"  {shlex.quote(str(folder / f'{run.name}.yaml'))}" for run in waiting)
    limit = f"%{parallel}" if parallel > 1 else ""
    job = f"""#!/usr/bin/env bash
#SBATCH --job-name={re.sub(r"[^A-Za-z0-9._-]", "_", folder.name)}
#SBATCH --array=0-{len(waiting) - 1}{limit}
#SBATCH --output={shlex.quote(f"{folder}/slurm-%A_%a.log")}
#SBATCH --signal=TERM@120
# Add what your cluster needs, such as --partition, --time, --gres=gpu:1 and --mem.
configs=(
{configs}
)
cd {shlex.quote(str(Path.cwd()))}
exec srun {shlex.quote(sys.executable)} -m gptjax train "${{configs[$SLURM_ARRAY_TASK_ID]}}"
"""
    path = folder / ARRAY_FILE
    write_atomic(path, job.encode())
    done = len(sweep.runs) - len(waiting)
    print(f"{len(sweep.runs)} runs, {done} of them finished before")
    print(f"sbatch {shlex.quote(str(path))}")
    return 0


def train_all(sweep: Sweep, parallel: int, train: Train) -> int:
    """The same for runs that are made; `train` starts one."""
    folder = Path(sweep.run_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    waiting = _waiting(sweep, folder)
    done = len(sweep.runs) - len(waiting)
    print(f"{len(sweep.runs)} runs, {done} of them finished before", flush=True)
    failed: dict[str, int] = {}
    stop = False

    def one(run: SweepRun) -> None:
        nonlocal done, stop
        if stop:
            return
        status = train(run, folder)
        if status in STOPPED:
            stop = True
        elif status:
            failed[run.name] = status
        done += status not in STOPPED
        words = f"status {status}; see {folder / run.name}.log" if status else _result(run)
        print(f"[{done}/{len(sweep.runs)}] {run.name}: {words}", flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(one, waiting))
    records = _records(sweep)
    for line in table(sweep, records, failed):
        print(line)
    for line in averages(sweep, records):
        print(line)
    if records:
        write_report(list(records.values()), folder / REPORT_FILE)
        print(folder / REPORT_FILE)
    if stop:
        notify("stopped by a signal; the same command continues the sweep")
        return 130
    return 1 if failed else 0


def table(sweep: Sweep, records: dict[str, RunRecord], failed: dict[str, int]) -> list[str]:
    """The runs' options and results as lines, the lowest validation loss first, then those without one."""
    heads = [*sweep.runs[0].options, "validation loss", "at step", "status"]

    def loss(run: SweepRun) -> float:
        best = records[run.name].best if run.name in records else None
        return float("inf") if best is None else best["val_loss"]

    rows = []
    for run in sorted(sweep.runs, key=loss):
        best = records[run.name].best if run.name in records else None
        status = (
            f"failed ({failed[run.name]})" if run.name in failed else "finished" if _finished(run) else "not finished"
        )
        result = ["-", "-"] if best is None else [f"{best['val_loss']:.4f}", str(best["step"])]
        rows.append([*(str(value) for value in run.options.values()), *result, status])
    widths = [max(len(row[n]) for row in [heads, *rows]) for n in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    ]


def averages(sweep: Sweep, records: dict[str, RunRecord]) -> list[str]:
    """The mean and the standard deviation of each score over folds and seeds, a line for each other set of options.

    The scores of a run are those of its best evaluation, by its `train.best_by`.
    """
    over = [name for name in sweep.runs[0].options if name in REPEATED]
    groups: dict[str, list[dict]] = {}
    for run in sweep.runs if over else ():
        others = " ".join(f"{name}={value}" for name, value in run.options.items() if name not in over)
        groups.setdefault(others, [])
        if run.name in records and (row := _best_row(records[run.name])):
            groups[others].append(row)
    lines = []
    for others, rows in groups.items():
        if len(rows) < 2:
            continue
        scores = [name for name in rows[0] if name != "step" and all(is_number(row.get(name)) for row in rows)]
        values = {name: [row[name] for row in rows] for name in scores}
        shown = " · ".join(
            f"{name.replace('_', ' ')} {statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}"
            for name, found in values.items()
        )
        lines.append(f"{others + ': ' if others else ''}{len(rows)} runs over {' and '.join(over)}: {shown}")
    return lines


def _best_row(record: RunRecord) -> dict | None:
    by = record.config.train.best_by
    scored = [row for row in record.evaluations if is_number(row.get(by))]
    return record.best if by == "loss" else max(scored, key=lambda row: row[by], default=None)


def _train(run: SweepRun, folder: Path) -> int:
    config = _write_config(run, folder)
    with open(folder / f"{run.name}.log", "ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "gptjax", "train", str(config)], stdout=log, stderr=log)
        while True:
            # Ctrl-C reaches the run too, which saves its state and ends.
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


def _config_file(run: SweepRun, folder: Path) -> Path:
    return folder / f"{run.name}.yaml"


def _write_config(run: SweepRun, folder: Path) -> Path:
    path = _config_file(run, folder)
    write_atomic(path, to_yaml(run.config).encode())
    return path


def _waiting(sweep: Sweep, folder: Path) -> list[SweepRun]:
    """The runs that are not finished.

    Raises:
        UserError: A finished run had other options than the sweep asks for now, so that its scores are not those of
            this sweep.
    """
    waiting = [run for run in sweep.runs if not _finished(run)]
    for run in sweep.runs:
        file = _config_file(run, folder)
        if run in waiting or not file.is_file():
            continue
        changed = differing_fields(load_config(file), run.config)
        for name, (old, new) in changed.items():
            if not name.startswith(MAY_CHANGE):
                raise UserError(
                    f"{folder / run.name}: was trained with {name}={old!r}, now {name}={new!r}; give the sweep another"
                    " run_dir, or the old value"
                )
    return waiting


def _finished(run: SweepRun) -> bool:
    record = _record(run)
    if record is None:
        return False
    steps = (record if run.config.train.num_epochs else run).config.train.num_steps
    if any(row["step"] >= steps for row in record.evaluations):
        return True
    last = record.events[-1] if record.events else {}
    return last.get("event") == "stop" and str(last.get("reason")).startswith("no better")


def _result(run: SweepRun) -> str:
    record = _record(run)
    best = None if record is None else record.best
    return "no evaluation" if best is None else f"validation loss {best['val_loss']:.4f} at step {best['step']:,}"


def _records(sweep: Sweep) -> dict[str, RunRecord]:
    found = {run.name: _record(run) for run in sweep.runs}
    return {name: record for name, record in found.items() if record is not None}


def _record(run: SweepRun) -> RunRecord | None:
    folder = Path(run.config.run_dir).expanduser()
    if not (folder / CONFIG_FILE).is_file() or not (folder / METRICS_FILE).is_file():
        return None
    with contextlib.suppress(UserError):
        return read_record(folder, run.name)
    return None
