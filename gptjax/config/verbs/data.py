"""Options of data."""

import dataclasses

from gptjax.config.rules import no_effect, not_negative, positive
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataVerbConfig(CheckpointConfig):
    """What data shows of a run."""

    step: int = 0
    """Show the documents that this step (from 1) trains on."""
    rank_loss: bool = False
    """Show the validation documents with the highest and the lowest loss, of the run's checkpoint."""
    documents: int = 256
    """Documents that rank_loss measures, evenly spaced over the validation text; 0: all."""
    show: int = 5
    """Documents that rank_loss prints of each kind."""

    def __post_init__(self):
        super().__post_init__()
        if (self.step > 0) == self.rank_loss:
            raise UserError("give either --step N, from 1, or --rank_loss")
        not_negative("", self, "step", "documents")
        positive("", self, "show")
        for name in ("documents", "show", "checkpoint"):
            no_effect("", self, name, self.rank_loss, "rank_loss")
