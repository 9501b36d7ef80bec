"""`events.jsonl`: starts, resumes, saves and ends of a run, with their times."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.report.metrics import plain

EVENTS_FILE = "events.jsonl"


def add_event(run_dir: Path, event: str, step: int, notify: Callable[[str], None] = print, **facts: Any) -> None:
    """Appends an event. If it cannot be written, as on a full disk, `notify` is called and the run continues.

    Args:
        run_dir: The run directory.
        event: start, resume, save or stop.
        step: The current step of the run.
        notify: Called with a line if the event cannot be written.
        facts: Additional fields; JSON values.
    """
    row = {"time": round(time.time(), 3), "event": event, "step": step, **facts}
    try:
        with open(run_dir / EVENTS_FILE, "ab") as file:
            file.write(json.dumps(plain(row), allow_nan=False).encode() + b"\n")
    except OSError as error:
        notify(f"{run_dir / EVENTS_FILE}: an event cannot be written: {error.strerror}; training continues")


def read_events(run_dir: Path) -> tuple[list[dict], int]:
    """Returns the events of a run, and the number of invalid lines, which a crash or an edit can leave."""
    path = run_dir / EVENTS_FILE
    if not path.is_file():
        return [], 0
    events, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            events.append({**row, "time": float(row["time"]), "event": str(row["event"]), "step": int(row["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
    return events, damaged
