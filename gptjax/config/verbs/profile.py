"""Options of profile."""

import dataclasses

from gptjax.config.rules import positive, usable_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Number of steps to trace; options of the run may follow, as for train."""

    steps: int = 5
    """Number of traced steps; two steps before them are not traced."""
    out: str = ""
    """New folder to store the trace in, for TensorBoard or Perfetto; empty: the trace is deleted."""

    def __post_init__(self):
        positive("", self, "steps")
        usable_paths("", self, "out")
