"""Options of predict."""

import dataclasses
from typing import Literal

from gptjax.config.rules import different_files, no_effect, not_negative, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictDataConfig:
    """How the file of predict is read; the other options of data are those of the run."""

    text_field: str = ""
    """Field that holds the text; empty: the one of the run."""
    encoding: Literal["utf-8", "utf-16", "latin-1", "cp1252"] = "utf-8"
    """Encoding of the file; parquet is always UTF-8."""
    quoting: Literal["format", "double", "none"] = "format"
    """Double quotes around fields of CSV and TSV. format: CSV has them, TSV has not; none: they are plain text."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """Bytes that are not valid in the encoding: stop, put U+FFFD, or leave the row out (counted)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig(CheckpointConfig):
    """Adds what a model predicts to each row: labels, numbers or written text; the result is JSONL."""

    run_dir: str = ""
    """Run directory of the model."""
    part: str = ""
    """Name of the task, of a run that learned several."""
    text: tuple[str, ...] = ()
    """One or several texts; for a run that tags, words separated by spaces."""
    file: str = ""
    """File of rows with the fields of the run's training data: .jsonl .csv .tsv .parquet .conll .conllu."""
    out: str = ""
    """JSONL file to write, complete or not at all; empty: standard output."""
    batch_size: int = 16
    """Texts in a batch."""
    max_new_tokens: int = 0
    """Largest number of tokens that a run of instruct or seq2seq writes for a row; 0: 64."""
    output_field: str = ""
    """Field of the text that such a run writes; empty: predicted."""
    data: PredictDataConfig = dataclasses.field(default_factory=PredictDataConfig)

    def __post_init__(self):
        super().__post_init__()
        if not self.run_dir:
            raise UserError("run_dir is missing; name the folder of a trained run")
        if bool(self.text) == bool(self.file):
            raise UserError("give either --text TEXT or --file FILE")
        for field in dataclasses.fields(PredictDataConfig):
            no_effect("data", self.data, field.name, bool(self.file), "file")
        usable_paths("", self, "run_dir", "file", "out")
        different_files(self, "file", "out")
        positive("", self, "batch_size")
        not_negative("", self, "max_new_tokens")
        no_effect("", self, "out", bool(self.file), "file")
