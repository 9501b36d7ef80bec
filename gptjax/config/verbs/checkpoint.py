"""Which checkpoint a verb uses."""

import dataclasses
from typing import Literal

from gptjax.config.rules import usable_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoint of a run is used."""

    checkpoint: Literal["best", "latest"] = "best"
    """best: by train.best_by of the run, lowest validation loss by default (latest where none was evaluated)."""
    strict: bool = False
    """Refuse a damaged checkpoint instead of using another one."""
    base: str = ""
    """Run directory of the base under an adapter or a head, if it was moved."""

    def __post_init__(self):
        usable_paths("", self, "base")
