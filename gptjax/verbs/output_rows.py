"""Writes rows of JSONL: the fields of the input rows and the results of a verb."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from gptjax.errors import UserError
from gptjax.files import atomic_file
from gptjax.text.formats import Row

FLUSH_EVERY = 1024
"""Rows."""


def renamed(row: Row, outputs: Sequence[str], counts: Counter[str]) -> dict[str, Any]:
    """Renames fields of a row that have the name of an output to `input.NAME`; `counts` is incremented at "renamed".

    Raises:
        UserError: The row already has a field of the new name.
    """
    clash = [name for name in outputs if name in row.values]
    if not clash:
        return row.values
    if taken := next((name for name in clash if f"input.{name}" in row.values), None):
        raise UserError(
            f"{row.where}: has both {taken!r} and 'input.{taken}'; rename one, the output has {taken!r} too"
        )
    counts["renamed"] += 1
    return {f"input.{name}" if name in clash else name: value for name, value in row.values.items()}


def write_file(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """Writes rows as JSONL to a file, atomically; returns their number.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        with atomic_file(path, "w") as file:
            return write_rows(rows, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_rows(rows: Iterable[dict[str, Any]], file: IO[str]) -> int:
    """Writes rows as JSONL, with null for NaN; returns their number."""
    count = 0
    for count, row in enumerate(rows, 1):
        file.write(json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        if count % FLUSH_EVERY == 0:
            file.flush()
    file.flush()
    return count


def without_nan(value: Any) -> Any:
    """Replaces NaN and infinity in nested values by None, because JSON does not have them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return {key: without_nan(item) for key, item in value.items()} if isinstance(value, dict) else value
