"""Options of profile."""

import dataclasses

from gptjax.config.rules import positive, usable_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """How many steps are traced; options of the run itself may follow, as for train."""

    steps: int = 5
    """Steps in the trace, after two that are not in it."""
    out: str = ""
    """New folder to keep the trace in, for TensorBoard or Perfetto."""

    def __post_init__(self):
        positive("", self, "steps")
        usable_paths("", self, "out")
