"""Selects the checkpoint that a verb uses."""

import dataclasses
from typing import Literal

from gptjax.config.rules import usable_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Selects the checkpoint of a run."""

    checkpoint: Literal["best", "latest"] = "best"
    """Checkpoint to use. best: by the run's train.best_by, by default the lowest validation loss (the latest one if
    none was evaluated); latest: the newest one."""
    strict: bool = False
    """Stop if the checkpoint is damaged, instead of using another one."""
    base: str = ""
    """Run directory of the base model of an adapter or a head, if it was moved."""

    def __post_init__(self):
        usable_paths("", self, "base")
