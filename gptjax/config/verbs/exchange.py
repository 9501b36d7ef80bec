"""Options of import and export."""

import dataclasses
from typing import Literal

from gptjax.config.rules import no_effect, not_empty, not_negative, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Converts a model of another program to a run."""

    to: str
    """Run directory to create."""
    tokenizer: str = ""
    """Name of a tiktoken encoding, for a model without a tokenizer file; empty: the model's own tokenizer."""
    base: str = ""
    """Run directory of the base model, to import a PEFT folder."""

    def __post_init__(self):
        not_empty(self, "to")
        usable_paths("", self, "to", "base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(CheckpointConfig):
    """Converts a run to a Hugging Face folder, a GGUF file or a PEFT folder."""

    to: str
    """Folder to write, or a file with the ending .gguf."""
    merge: bool = False
    """Merge a LoRA adapter into the weights of its base."""
    adapter: bool = False
    """Write only a LoRA adapter, as a PEFT folder."""
    average: int = 1
    """Export the average of the parameters of this many newest checkpoints."""
    head: bool = False
    """Write the head of a run with task.kind=classify or tag instead of the output projection."""
    family: str = ""
    """Family of models to write (model_type in config.json); empty: the first one that is equivalent to the run."""
    max_shard_mb: int = 0
    """Largest size of a file of weights, in MiB; 0: one file."""
    gguf_type: Literal["", "f32", "f16", "q8_0"] = ""
    """Type of matrices in a GGUF file; empty: f16."""

    def __post_init__(self):
        super().__post_init__()
        not_empty(self, "to")
        usable_paths("", self, "to")
        not_negative("", self, "max_shard_mb")
        positive("", self, "average")
        no_effect("", self, "average", self.checkpoint == "latest", "checkpoint=latest")
        no_effect("", self, "gguf_type", self.is_gguf, "a file to write whose name ends with .gguf")
        no_effect("", self, "max_shard_mb", not self.is_gguf and not self.adapter, "a folder with a whole model")
        no_effect("", self, "head", not self.is_gguf and not self.adapter, "a folder with a whole model")
        no_effect("", self, "adapter", not self.is_gguf and not self.merge, "a folder to write, and without merge")

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is written."""
        return self.to.endswith(".gguf")
