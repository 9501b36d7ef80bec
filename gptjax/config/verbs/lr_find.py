"""Options of lr-find."""

import dataclasses

from gptjax.config.rules import positive, usable_paths
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LrFindConfig:
    """The rates that are tried; options of the run itself may follow, as for train."""

    low: float = 1e-6
    """First learning rate."""
    high: float = 1.0
    """Last learning rate; the test ends earlier when the loss rises."""
    steps: int = 200
    """Steps from the first to the last rate."""
    out: str = ""
    """File for the chart; empty: lr_find.html in this folder."""

    def __post_init__(self):
        if not 0 < self.low < self.high:
            raise UserError(f"low={self.low} and high={self.high}: low must be above 0 and below high")
        if self.steps < 10:
            raise UserError(f"steps={self.steps} must be at least 10")
        positive("", self, "steps")
        usable_paths("", self, "out")
