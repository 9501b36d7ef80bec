"""`metrics.jsonl`: one JSON object a line, keyed by step."""

import json
from pathlib import Path

from gptjax.files import write_atomic

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends rows; opened at a step, it forgets the rows of later steps, which will be made again."""

    def __init__(self, run_dir: Path, step: int):
        path = run_dir / METRICS_FILE
        if path.exists():
            kept = [line for line in read_lines(path) if json.loads(line)["step"] <= step]
            write_atomic(path, "".join(kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, row: dict) -> None:
        """Appends a row and hands it to the system, so that a killed process loses none."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_lines(path: Path) -> list[str]:
    """Whole lines of a metrics file; one that a crash cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def read_metrics(run_dir: Path) -> list[dict]:
    """All rows of a run."""
    return [json.loads(line) for line in read_lines(run_dir / METRICS_FILE)]
