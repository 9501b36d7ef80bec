"""Options of evaluate."""

import dataclasses
import re
from typing import Literal

from gptjax.config.data import DataConfig
from gptjax.config.rules import no_effect, not_negative, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.config.verbs.decoding import no_empty_text
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CheckpointConfig):
    """Measures a trained model on its own validation data, or on the text or rows in data."""

    run_dir: str = ""
    """Run directory of the model."""
    windows: int = 0
    """Number of windows of text to measure, evenly spaced; 0: all."""
    batch_size: int = 16
    """Number of windows or texts in a batch."""
    language_model: bool = False
    """For a run with labels: measure the next-token loss on the text of the run in init_from."""
    part: str = ""
    """Name of the task, for a run with task.kind=multi."""
    figure: str = ""
    """File to write a figure of the confusion matrix of labels to: .png, .svg or .pdf; empty: none."""
    stride: int = 0
    """Sliding windows: number of tokens by which a window moves forward; each token is scored once. 0: windows do not
    overlap."""
    benchmark: Literal[
        "none", "choices", "generate", "hellaswag", "lambada", "arc", "piqa", "winogrande", "boolq", "mmlu"
    ] = "none"
    """Benchmark, which sets the format of the rows: multiple choice by likelihood, or (generate) generated answers."""
    generate: bool = False
    """For a run of instruct or seq2seq: generate responses and compare them with the rows: exact match, BLEU, chrF,
    ROUGE-L (extra evaluate)."""
    shots: int = 0
    """Number of examples with answers before each question of a benchmark (few-shot)."""
    shots_path: tuple[str, ...] = ()
    """Files of rows for few-shot examples; empty: other rows of the same file."""
    seed: int = 0
    """Random seed for the choice of few-shot examples."""
    max_new_tokens: int = 64
    """Largest number of tokens of a generated answer."""
    stop: tuple[str, ...] = ("\n",)
    """Strings that end a generated answer."""
    pattern: str = ""
    """Regular expression whose first group is the answer in a generated text; empty: the whole text is the answer."""
    text_scores: bool = False
    """Also print BLEU, chrF and ROUGE-L of generated answers (extra evaluate)."""
    compute_dtype: Literal["run", "float32", "bfloat16"] = "run"
    """Type of matmul operands; run: that of train.compute_dtype."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Round weights as sample does with this option, to measure what it costs."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self):
        super().__post_init__()
        if not self.run_dir:
            raise UserError("run_dir is missing; name the folder of a trained run")
        usable_paths("", self, "run_dir", "figure")
        for name in ("validation_fraction", "verify"):
            no_effect("data", self.data, name, False, "a split for validation, which evaluate does not make")
        for name in ("clean", "skip", "packing", "license"):
            no_effect("data", self.data, name, False, "a text to train on")
        if not (self.data.path or self.data.source or self.data.hf_dataset) and self.data != DataConfig():
            raise UserError(
                "data options have no effect on the run's own data; set data.path, source or hf_dataset too"
            )
        not_negative("", self, "windows", "stride", "shots", "seed")
        no_effect("", self, "windows", not self.stride, "windows side by side (stride=0)")
        if self.language_model:
            no_effect("", self, "figure", False, "labels")
        positive("", self, "batch_size", "max_new_tokens")
        self._check_benchmark()
        if self.figure and not self.figure.endswith((".png", ".svg", ".pdf")):
            raise UserError(f"figure={self.figure!r} must end in .png, .svg or .pdf")

    def _check_benchmark(self):
        asked = self.benchmark != "none"
        no_effect("", self, "shots", asked, "benchmark")
        for name in ("shots_path", "seed"):
            no_effect("", self, name, self.shots > 0, "shots")
        for name in ("max_new_tokens", "pattern"):
            no_effect("", self, name, self.generate or self.benchmark == "generate", "generate or benchmark=generate")
        for name in ("stop", "text_scores"):
            no_effect("", self, name, self.benchmark == "generate", "benchmark=generate")
        if self.generate:
            for name in ("benchmark", "language_model", "figure", "windows", "stride"):
                no_effect("", self, name, False, "generate=false")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"pattern={self.pattern!r} is not a regular expression: {error}") from None
        no_empty_text(self, "stop")
        if not asked:
            return
        for name in ("windows", "stride", "language_model", "figure", "part"):
            no_effect("", self, name, False, "a text or labels: benchmark is set, which is always measured whole")
        if not (self.data.path or self.data.hf_dataset):
            raise UserError(f"benchmark={self.benchmark} needs rows; give --data.path FILE or --data.hf_dataset NAME")
