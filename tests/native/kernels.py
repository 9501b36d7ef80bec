"""What tests of kernels share: a test runs by kernels, or is skipped with a reason that lies in the machine."""

import re

import jax
import numpy as np
import pytest

from gptjax.machine.native import build

# Of the relative norm. bfloat16 keeps 8 bits, and results and gradients are rounded once or twice; float32 keeps 24, of
# sums of up to a thousand terms.
TOLERANCE = {"bfloat16": 8e-3, "float32": 2e-6}
# Of each number, relative to its size plus the root mean square of all: so that a few wrong ones are seen, which hardly
# change a norm.
OF_EACH = {"bfloat16": 0.03, "float32": 2e-5}


def need(dtype: str = "bfloat16") -> None:
    """Skips a test where the machine has no kernels for a dtype; fails it where it should have some and has none."""
    if reason := build.reason_for_none():
        pytest.skip(reason)
    if build._folder is None:
        pytest.skip("another user can write to the folders of compiled programs")
    assert build.ready(), build.state()
    if dtype == "float32" and not build.has_tiles():
        pytest.skip(f"kernels for float32 need AMX: {build.state()}")


def kernels_of(function, *args) -> set[str]:
    """The kernels that a function calls when it is compiled for these arguments."""
    return set(re.findall(r"@gptjax_(\w+)", jax.jit(function).lower(*args).as_text()))


def assert_close(found, expected, dtype: str) -> None:
    """Holds the norm of the difference, and the difference of each number, to the precision of a dtype."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= TOLERANCE[dtype] * np.linalg.norm(expected)
    allowed = OF_EACH[dtype] * (np.abs(expected) + np.sqrt(np.mean(expected**2)))
    assert np.sum(~(np.abs(found - expected) <= allowed)) == 0
