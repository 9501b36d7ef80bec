"""Selects the rows of a batch that one process makes."""

from typing import Any

import numpy as np

Rows = slice | np.ndarray
"""Numbers of rows in the global batch; a slice for those that lie together."""
ALL: Rows = slice(None)


def take_rows(batch: Any, rows: Rows) -> Any:
    """Returns `rows` of a batch: a tree of named tuples, dicts, None and arrays `[rows, ...]`."""
    if batch is None:
        return batch
    if isinstance(batch, np.ndarray):
        return batch[rows]
    if isinstance(batch, dict):
        return type(batch)((name, take_rows(part, rows)) for name, part in batch.items())
    return type(batch)(*(take_rows(part, rows) for part in batch))
