"""Options of embed."""

import dataclasses
from typing import Literal

from gptjax.config.rules import different_files, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig(CheckpointConfig):
    """Writes an embedding for each text of a file."""

    run_dir: str = ""
    """Run directory of the model."""
    file: str = ""
    """Input file of rows: .jsonl .csv .tsv .parquet."""
    out: str = ""
    """Output file: .parquet or .jsonl with the rows and a field embedding, or .npy with only the vectors."""
    text_field: str = "text"
    """Name of the field with the text."""
    layer: int = -1
    """Layer: hidden states after this many blocks. 0: the token embeddings; -1: after all blocks and the final norm."""
    pooling: Literal["mean", "last"] = "mean"
    """Pooling of hidden states: the mean over a text's positions, or the last position."""
    normalized: bool = False
    """Scale vectors to length 1."""
    batch_size: int = 16
    """Number of texts in a batch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matmul operands and activations."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("run_dir", "file", "out"):
            if not getattr(self, name):
                raise UserError(f"{name} is missing; gptjax embed --run_dir DIR --file IN.jsonl --out OUT.parquet")
        usable_paths("", self, "run_dir", "file", "out")
        different_files(self, "file", "out")
        positive("", self, "batch_size")
        if not self.out.endswith((".parquet", ".jsonl", ".npy")):
            raise UserError(f"out={self.out!r} must end in .parquet, .jsonl or .npy")
