"""Options of data."""

import dataclasses

from gptjax.config.rules import no_effect, not_negative, positive
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataVerbConfig(CheckpointConfig):
    """Documents of a run's data to show."""

    step: int = 0
    """Show the documents of the batch of this step, counted from 1."""
    rank_loss: bool = False
    """Show the validation documents with the highest and the lowest loss."""
    documents: int = 256
    """Number of documents that rank_loss measures, evenly spaced over the validation text; 0: all."""
    show: int = 5
    """Number of documents of highest loss, and of lowest loss, that rank_loss prints."""

    def __post_init__(self):
        super().__post_init__()
        if (self.step > 0) == self.rank_loss:
            raise UserError("give either --step N, from 1, or --rank_loss")
        not_negative("", self, "step", "documents")
        positive("", self, "show")
        for name in ("documents", "show", "checkpoint"):
            no_effect("", self, name, self.rank_loss, "rank_loss")
