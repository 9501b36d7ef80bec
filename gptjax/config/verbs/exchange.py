"""Options of import and export."""

import dataclasses
from typing import Literal

from gptjax.config.rules import no_effect, not_negative, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Options of import."""

    to: str
    """Run directory to make."""
    tokenizer: str = ""
    """Name of a tiktoken encoding, for a model without a tokenizer file."""
    base: str = ""
    """Run directory of the model that a PEFT folder adapts."""

    def __post_init__(self):
        usable_paths("", self, "to", "base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(CheckpointConfig):
    """Options of export."""

    to: str
    """Folder to write, or a file whose name ends with .gguf."""
    merge: bool = False
    """Merge a lora adapter into the weights of its base."""
    adapter: bool = False
    """Write a lora adapter alone, as a PEFT folder."""
    average: int = 1
    """Average the parameters of this many newest checkpoints."""
    head: bool = False
    """Write the head of a run with task.kind=classify or tag in place of the output projection."""
    family: str = ""
    """Family of models to write, as config.json names it in model_type; empty: the first that computes the same."""
    max_shard_mb: int = 0
    """Largest file of weights, in MiB; 0: one file."""
    gguf_type: Literal["", "f32", "f16", "q8_0"] = ""
    """Type of the matrices in a GGUF file; empty: f16."""

    def __post_init__(self):
        super().__post_init__()
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
