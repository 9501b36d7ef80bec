"""`metrics.jsonl`: one JSON object a line, keyed by step."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.errors import UserError
from gptjax.files import write_atomic

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends rows. If it is opened at a step, rows of later steps are deleted, because the run repeats these steps.

    If a row cannot be written, as on a full disk, it is counted and reported once, and the run continues.

    Raises:
        UserError: A line is not a valid row.
    """

    def __init__(self, run_dir: Path, step: int, notify: Callable[[str], None] = print):
        self._path, self._notify, self._lost = run_dir / METRICS_FILE, notify, 0
        if self._path.exists():
            kept = "".join(line for line, row in _rows(self._path) if row["step"] <= step).encode()
            if len(kept) != self._path.stat().st_size:
                write_atomic(self._path, kept)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._end = os.fstat(self._file.fileno()).st_size

    def write(self, row: dict) -> None:
        """Appends a row without buffering, so that a killed process loses no row. NaN becomes null."""
        line = json.dumps(plain(row), allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError("No space left on device")
            self._end += len(line)
        except OSError as error:
            self._lost += 1
            os.ftruncate(self._file.fileno(), self._end)  # remove the incomplete row
            if self._lost == 1:
                self._notify(f"{self._path}: a row cannot be written: {error.strerror or error}; training continues")

    def sync(self) -> None:
        """Flushes all rows to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._lost:
            self._notify(f"{self._path}: {self._lost} rows could not be written")
        self._file.close()


class Nowhere:
    """Discards rows: the metrics file of processes other than the first one."""

    def write(self, row: dict) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_lines(path: Path) -> list[str]:
    """The complete lines of a metrics file; ignores an incomplete last line, which a crash can leave."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def read_metrics(run_dir: Path) -> list[dict]:
    """All rows of a run.

    Raises:
        UserError: A line is not a valid row.
    """
    return [row for _, row in _rows(run_dir / METRICS_FILE)]


def _rows(path: Path) -> list[tuple[str, dict]]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            rows.append((line, row | {"step": int(row["step"])}))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"{path}, line {number}: no JSON object with a step; the file is damaged: move it away or correct it"
            ) from None
    return rows


def plain(value: Any) -> Any:
    """Returns `value` with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
