"""Options of predict."""

import dataclasses
from typing import Literal

from gptjax.config.rules import different_files, no_effect, not_negative, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictDataConfig:
    """Format of the input file of predict; other options of data are those of the run."""

    text_field: str = ""
    """Name of the field with the text; empty: that of the run."""
    encoding: Literal["utf-8", "utf-16", "latin-1", "cp1252"] = "utf-8"
    """Text encoding of the file; parquet is always UTF-8."""
    quoting: Literal["format", "double", "none"] = "format"
    """Meaning of double quotes around fields. double: they enclose a field, in CSV and TSV; format: only in CSV; none:
    they are plain text."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """For bytes that are invalid in the encoding. error: stop; replace: put U+FFFD; skip: leave out the row
    (counted)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig(CheckpointConfig):
    """Adds predictions to each row: labels, numbers, answers, scores or generated text. The result is JSONL."""

    run_dir: str = ""
    """Run directory of the model."""
    part: str = ""
    """Name of the task, for a run with task.kind=multi."""
    text: tuple[str, ...] = ()
    """One or several texts; for a run with task.kind=tag, words separated by spaces."""
    file: str = ""
    """File of rows with the fields of the run's training data: .jsonl .csv .tsv .parquet .conll .conllu."""
    out: str = ""
    """JSONL file to write (atomically); empty: standard output."""
    batch_size: int = 16
    """Number of texts in a batch."""
    max_new_tokens: int = 0
    """For a run of instruct or seq2seq: largest number of generated tokens per row; 0: 64."""
    output_field: str = ""
    """For a run of instruct or seq2seq: name of the field with the generated text; empty: predicted."""
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
