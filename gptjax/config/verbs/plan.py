"""Options of plan."""

import dataclasses

from gptjax.config.rules import positive
from gptjax.errors import UserError, did_you_mean

CHIP_NAMES = (
    *("h100", "h100-pcie", "h100-nvl", "h200", "h200-nvl", "gh200", "b200", "gb200"),
    *("a100", "a100-pcie", "a100-40gb", "a100-40gb-pcie", "l4", "l40", "l40s", "v4", "v5e", "v5p", "v6e"),
)
"""The keys of `machine.chips.CHIPS`."""
MOST_DEVICES = 512
"""Largest number of virtual devices for which a step is compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The chips that a run is planned for; options of the run itself may follow, as for train."""

    devices: int
    """Number of chips, up to 512."""
    chip: str
    """Chip to plan for: h100, h100-pcie, h100-nvl, h200, h200-nvl, gh200, b200, gb200, a100, a100-pcie, a100-40gb,
    a100-40gb-pcie, l4, l40, l40s, v4, v5e, v5p or v6e."""
    json: bool = False
    """Print the plan as one JSON object, in bytes, FLOPs and seconds."""

    def __post_init__(self):
        positive("", self, "devices")
        if self.devices > MOST_DEVICES:
            raise UserError(f"devices={self.devices} must be at most {MOST_DEVICES}")
        if self.chip not in CHIP_NAMES:
            raise UserError(
                f"chip={self.chip!r} must be one of {', '.join(CHIP_NAMES)}.{did_you_mean(self.chip, CHIP_NAMES)}"
            )
