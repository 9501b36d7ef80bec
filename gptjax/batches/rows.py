"""Rows of a batch: what a process makes of it."""

from typing import Any

import numpy as np

Rows = slice | np.ndarray
"""Numbers of rows in the global batch; a slice for those that lie together."""
ALL: Rows = slice(None)


def take_rows(batch: Any, rows: Rows) -> Any:
    """Returns these rows of a batch: named tuples and dicts of arrays `[rows, ...]`, and None where there is none."""
    if batch is None:
        return batch
    if isinstance(batch, np.ndarray):
        return batch[rows]
    if isinstance(batch, dict):
        return type(batch)((name, take_rows(part, rows)) for name, part in batch.items())
    return type(batch)(*(take_rows(part, rows) for part in batch))
