"""Options of diagnose."""

import dataclasses

from gptjax.config.rules import not_negative, positive
from gptjax.config.verbs.checkpoint import CheckpointConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(CheckpointConfig):
    """Amount of validation text to analyse."""

    windows: int = 512
    """Number of windows of validation text, evenly spaced; 0: all."""
    batch_size: int = 8
    """Windows in a batch. All logits of a batch are in memory."""
    sample_tokens: int = 128
    """Length in tokens of the samples in which repetition is measured; 0: no samples."""

    def __post_init__(self):
        super().__post_init__()
        not_negative("", self, "windows", "sample_tokens")
        positive("", self, "batch_size")
