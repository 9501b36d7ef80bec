"""Rows of JSONL that verbs write: the fields of the input, and what was found for each."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from gptjax.errors import UserError
from gptjax.files import publish, temporary_name
from gptjax.text.formats import Row

FLUSH_EVERY = 1024
"""Rows."""


def renamed(row: Row, outputs: Sequence[str], counts: Counter[str]) -> dict[str, Any]:
    """The row's values, under names that the outputs do not have; `counts` gets "renamed".

    Raises:
        UserError: It has both a name of an output and what that would become.
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
    """Writes rows as JSONL to a file that is complete or not there; returns how many.

    Raises:
        UserError: It cannot be written.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            count = write_rows(rows, file)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return count


def write_rows(rows: Iterable[dict[str, Any]], file: TextIO) -> int:
    """Writes rows as JSONL, NaN as null; returns how many."""
    count = 0
    for count, row in enumerate(rows, 1):
        file.write(json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        if count % FLUSH_EVERY == 0:
            file.flush()
    file.flush()
    return count


def without_nan(value: Any) -> Any:
    """Nested plain values with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return {key: without_nan(item) for key, item in value.items()} if isinstance(value, dict) else value
