"""Sizes that grow during a run, written as STEP:SIZE."""

import re

from gptjax.errors import UserError


def parse_ramp(name: str, items: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Returns pairs of a step and the size from that step on.

    Raises:
        UserError: An item is not of the form STEP:SIZE.
    """
    for item in items:
        if not re.fullmatch(r"\d{1,10}:[1-9]\d{0,9}", item):
            raise UserError(f"{name}: {item!r} must be like 500:16, a step and a size")
    return tuple((int(step), int(size)) for step, _, size in (item.partition(":") for item in items))


def check_ramp(name: str, ramp: tuple[tuple[int, int], ...], last_name: str, last: int) -> None:
    """Holds a ramp against the size that it must end with."""
    steps, sizes = zip(*ramp, strict=True)
    if steps[0] != 0 or list(steps) != sorted(set(steps)):
        raise UserError(f"{name}: steps {', '.join(map(str, steps))} must ascend from 0")
    if list(sizes) != sorted(set(sizes)) or sizes[-1] != last:
        raise UserError(f"{name}: sizes {', '.join(map(str, sizes))} must ascend to {last_name}={last}")
