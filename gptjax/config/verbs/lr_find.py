"""Options of lr-find."""

import dataclasses

from gptjax.config.rules import page_file, positive, usable_paths
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LrFindConfig:
    """Range of learning rates to try; options of the run may follow, as for train."""

    low: float = 1e-6
    """First (lowest) learning rate."""
    high: float = 1.0
    """Last learning rate; the test ends earlier if the loss rises."""
    steps: int = 200
    """Number of steps from the first to the last rate."""
    out: str = ""
    """HTML file to write the chart to; empty: lr_find.html in the current folder."""

    def __post_init__(self):
        if not 0 < self.low < self.high:
            raise UserError(f"low={self.low} and high={self.high}: low must be above 0 and below high")
        if self.steps < 10:
            raise UserError(f"steps={self.steps} must be at least 10")
        positive("", self, "steps")
        usable_paths("", self, "out")
        page_file(self, "out")
