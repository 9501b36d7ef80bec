"""Options of inspect."""

import dataclasses

from gptjax.config.rules import page_file, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(CheckpointConfig):
    """Shows attention, probabilities and layers of a model for one text."""

    text: str = ""
    """Text to run the model on; at most model.block_size tokens, and at most 512."""
    out: str = ""
    """HTML file to write; empty: inspect.html in the run directory."""

    def __post_init__(self):
        super().__post_init__()
        if not self.text:
            raise UserError("text is missing; give --text TEXT")
        usable_paths("", self, "out")
        page_file(self, "out")
