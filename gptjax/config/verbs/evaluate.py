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
    """Measures a trained model on its own validation data, or on all of the text or rows that `data` names."""

    run_dir: str = ""
    """Run directory of the model."""
    windows: int = 0
    """Windows of text to measure, evenly spaced; 0: all."""
    batch_size: int = 16
    """Windows or texts in a batch."""
    language_model: bool = False
    """Measure the next-token loss of a run that learned labels, on the text of the run it started from."""
    part: str = ""
    """Name of the task, of a run that learned several."""
    figure: str = ""
    """File for a figure of the confusion matrix of labels: .png, .svg or .pdf."""
    stride: int = 0
    """Tokens that windows over a text move forward; each token is scored once. 0: windows stand side by side."""
    benchmark: Literal[
        "none", "choices", "generate", "hellaswag", "lambada", "arc", "piqa", "winogrande", "boolq", "mmlu"
    ] = "none"
    """Format of rows with questions: multiple choice by likelihood, or (generate) answers that are generated."""
    generate: bool = False
    """Compare what a run of instruct or seq2seq writes with its rows: exact match, BLEU, chrF, ROUGE-L (extra
    evaluate)."""
    shots: int = 0
    """Examples with their answers before each question of a benchmark."""
    shots_path: tuple[str, ...] = ()
    """Files of rows that the examples are chosen from; empty: other rows of the same file."""
    seed: int = 0
    """Random seed of the choice of examples."""
    max_new_tokens: int = 64
    """Largest number of tokens of a generated answer."""
    stop: tuple[str, ...] = ("\n",)
    """Strings that end a generated answer."""
    pattern: str = ""
    """Regular expression whose first group is the answer in a generated text; empty: all of the text is."""
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
        for name in ("clean", "skip"):
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
