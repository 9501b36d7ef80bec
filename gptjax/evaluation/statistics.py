"""Means over the items of a benchmark, and their standard errors."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Mean(NamedTuple):
    """A mean over items."""

    value: float
    error: float
    """Standard error: the sample's standard deviation divided by the square root of its size; NaN for a single item."""

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


def mean(values: np.ndarray) -> Mean:
    """The mean of a sample."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(float(np.mean(values)), error)


def joined(parts: Sequence[Any]) -> Any:
    """Concatenates the results of several files; results are tuples of arrays over items."""
    return type(parts[0])(*map(np.concatenate, zip(*parts, strict=True)))
