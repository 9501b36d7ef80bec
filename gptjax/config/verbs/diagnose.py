"""Options of diagnose."""

import dataclasses

from gptjax.config.rules import not_negative, positive
from gptjax.config.verbs.checkpoint import CheckpointConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(CheckpointConfig):
    """How much of a run's validation text is looked at."""

    windows: int = 512
    """Windows of text, evenly spaced; 0: all."""
    batch_size: int = 8
    """Windows in a batch; all logits of a batch are in memory."""
    sample_tokens: int = 128
    """Length of the texts in which repetition is measured; 0: none."""

    def __post_init__(self):
        super().__post_init__()
        not_negative("", self, "windows", "sample_tokens")
        positive("", self, "batch_size")
