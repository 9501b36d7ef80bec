"""Sizes that grow during a run, as functions of the step alone, so that a run resumes exactly."""

from collections.abc import Sequence

Ramp = Sequence[tuple[int, int]]
"""Pairs of a step and the value from that step on, ascending, the first from step 0."""


def value_at(ramp: Ramp, step: int) -> int:
    """The value of a ramp at a step."""
    return [value for first, value in ramp if first <= step][-1]


def sum_before(ramp: Ramp, step: int) -> int:
    """The sum of the values of a ramp over all steps before `step`."""
    ends = [*(first for first, _ in ramp[1:]), step]
    return sum(max(0, min(end, step) - first) * value for (first, value), end in zip(ramp, ends, strict=True))
