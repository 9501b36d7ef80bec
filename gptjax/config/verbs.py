"""Options of the verbs other than train, as frozen dataclasses: the only place of their defaults."""

import dataclasses
import re
from typing import Literal

from gptjax.config.rules import local_folders, no_effect, not_negative, positive, usable_paths
from gptjax.config.run import Config, DataConfig
from gptjax.errors import UserError, did_you_mean

CHIP_NAMES = (
    *("h100", "h100-pcie", "h100-nvl", "h200", "h200-nvl", "gh200", "b200", "gb200"),
    *("a100", "a100-pcie", "a100-40gb", "a100-40gb-pcie", "l4", "l40", "l40s", "v4", "v5e", "v5p", "v6e"),
)
"""The names of `machine.chips.CHIPS`."""
MOST_ROWS = 2**16
"""Largest number of continuations in one call."""
LARGEST_BIAS = 10_000
"""Largest absolute value of a bias of logits."""
MOST_DEVICES = 512
"""Virtual devices that a step is compiled for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoint of a run is used."""

    checkpoint: Literal["best", "latest"] = "best"
    """best: by train.best_by of the run, lowest validation loss by default (latest where none was evaluated)."""
    strict: bool = False
    """Refuse a damaged checkpoint instead of using another one."""
    base: str = ""
    """Run directory of the base under an adapter or a head, if it was moved."""

    def __post_init__(self):
        usable_paths("", self, "base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig(CheckpointConfig):
    """How tokens are chosen, how many, and in which precision: options that sample and chat share."""

    run_dir: str = ""
    """Run directory of the model."""
    max_new_tokens: int = 256
    """Largest number of new tokens; a sample ends earlier at end-of-text."""
    temperature: float = 1.0
    """Divides the logits; 0: greedy decoding."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities sum to this (nucleus sampling, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Leave out tokens whose probability is below this share of the largest one (arXiv:2407.01082)."""
    typical_p: float = 1.0
    """Sample among the most typical tokens whose probabilities sum to this (arXiv:2202.00666)."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that prompt or sample already have become less likely (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the sample already has."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the sample already has it."""
    logit_bias: tuple[str, ...] = ()
    """Added to logits: TOKEN_ID=VALUE, one or several."""
    min_new_tokens: int = 0
    """End-of-text is not chosen before this many new tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; the sample is cut before them."""
    seed: int = 0
    """Random seed; the same seed gives the same text, whatever else is in the batch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matmul operands; on a GPU or TPU also of activations and the cache, which are float32 on a CPU."""
    quantize: Literal["none", "int8"] = "none"
    """int8: weights are rounded to 8 bits with a scale for each output; faster for one sequence on a CPU."""
    ignore_end_of_text: bool = False
    """Continue after end-of-text."""

    def __post_init__(self):
        super().__post_init__()
        usable_paths("", self, "run_dir")
        positive("", self, "max_new_tokens")
        not_negative("", self, "temperature", "top_k", "min_new_tokens")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must lie in [0, 2**32)")
        if 0 < self.temperature < 1e-3:
            raise UserError(f"temperature={self.temperature} must be 0 (the most likely token) or at least 0.001")
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p} must lie in [0, 1]")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 changes nothing")
        no_empty_text(self, "stop")
        token_biases(self)
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}"
            )
        no_effect("", self, "min_new_tokens", not self.ignore_end_of_text, "ignore_end_of_text=false")
        for name in ("top_k", "top_p", "min_p", "typical_p"):
            no_effect("", self, name, self.temperature > 0, "temperature above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(DecodingConfig):
    """Continues prompts with a trained model."""

    prompt: tuple[str, ...] = ()
    """One or several texts to continue; standard input where neither this nor prompt_file is given."""
    prompt_file: str = ""
    """File whose whole text is the prompt; with `out`, rows of .jsonl .csv .tsv or .parquet, of which each has one."""
    out: str = ""
    """JSONL file to write: the rows of prompt_file with their samples."""
    prompt_template: str = "{prompt}"
    """Prompt of a row of prompt_file: {NAME} stands for the row's field, {{ and }} for braces."""
    batch_size: int = 16
    """Prompts of rows that are continued together."""
    raw: bool = False
    """Give the prompt as it is to a run with task.kind=instruct, instead of as the user's message in its template."""
    num_samples: int = 1
    """Continuations of each prompt."""
    no_repeat_ngram: int = 0
    """Never repeat an n-gram of this many tokens, prompt included; 0: n-grams may repeat."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not written, each also with a space before it, as the tokenizer splits them."""
    num_beams: int = 1
    """Continuations that beam search keeps at each step; 1: no beam search."""
    length_penalty: float = 1.0
    """Beam search divides a sum of log-probabilities by the length to this power; above 0 favours long samples."""
    logprobs: int = 0
    """Show the log-probability of each chosen token and of this many most likely ones."""
    json: bool = False
    """Print one JSON object per sample."""
    allow_special: bool = False
    """Read the tokenizer's end token, such as <|endoftext|>, in a prompt as that token instead of plain text."""

    def __post_init__(self):
        super().__post_init__()
        positive("", self, "num_samples", "num_beams")
        not_negative("", self, "no_repeat_ngram", "logprobs")
        usable_paths("", self, "prompt_file", "out")
        positive("", self, "batch_size")
        no_effect("", self, "out", bool(self.prompt_file), "prompt_file")
        no_effect("", self, "json", not self.out, "standard output")
        for name in ("prompt_template", "batch_size"):
            no_effect("", self, name, bool(self.out), "out")
        if max(1, len(self.prompt)) * self.num_samples > MOST_ROWS:
            raise UserError(
                f"num_samples={self.num_samples} of {max(1, len(self.prompt))} prompts: at most {MOST_ROWS}"
            )
        if self.prompt and self.prompt_file:
            raise UserError("prompt and prompt_file are both set; give one")
        no_empty_text(self, "bad_words")
        no_effect("", self, "length_penalty", self.num_beams > 1, "num_beams above 1")
        if self.num_beams > 1:
            if self.temperature > 0:
                raise UserError(f"num_beams={self.num_beams} needs temperature=0: beam search draws nothing")
            if self.num_samples > self.num_beams:
                raise UserError(f"num_samples={self.num_samples} must be at most num_beams={self.num_beams}")
            for name in ("stop", "logprobs"):
                no_effect("", self, name, False, "num_beams=1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(DecodingConfig):
    """Talks with a trained model."""

    system: str = ""
    """First message, of role system."""

    def __post_init__(self):
        super().__post_init__()
        if not self.run_dir:
            raise UserError("run_dir is missing; name the folder of a trained run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(CheckpointConfig):
    """Serves a trained model over HTTP, in the form of OpenAI's API."""

    run_dir: str = ""
    """Run directory of the model."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only, 0.0.0.0 from everywhere."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    model_name: str = ""
    """Name of the model in requests; empty: the name of the run directory."""
    slots: int = 8
    """Sequences that are decoded together; each has a cache of model.block_size tokens."""
    api_keys: str = ""
    """File with one API key per line, of which every request must have one; empty: none is needed."""
    cors_origin: tuple[str, ...] = ()
    """Origins of web pages that may use the server, such as https://example.org; none by default."""
    max_body_bytes: int = 1_048_576
    """Largest body of a request."""
    max_prompt_tokens: int = 0
    """Longest prompt; 0: model.block_size."""
    max_new_tokens: int = 1024
    """Largest number of new tokens of a sequence."""
    max_queue: int = 64
    """Sequences that may wait for a slot; requests beyond get status 429."""
    max_seconds: float = 300.0
    """Time limit of a request: one that still waits for a slot gets status 503, the text of others ends there."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matmul operands; on a GPU or TPU also of activations and the cache, which are float32 on a CPU."""
    quantize: Literal["none", "int8"] = "none"
    """int8: weights are rounded to 8 bits with a scale for each output."""

    def __post_init__(self):
        super().__post_init__()
        if not self.run_dir:
            raise UserError("run_dir is missing; name the folder of a trained run")
        usable_paths("", self, "run_dir", "api_keys")
        positive("", self, "slots", "max_body_bytes", "max_new_tokens", "max_seconds")
        not_negative("", self, "port", "max_prompt_tokens", "max_queue")
        if self.port > 65535:
            raise UserError(f"port={self.port} must lie in [0, 65535]")
        for origin in self.cors_origin:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise UserError(f"cors_origin={origin!r} must be an origin such as https://example.org")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig(CheckpointConfig):
    """Writes a vector for each text of a file."""

    run_dir: str = ""
    """Run directory of the model."""
    file: str = ""
    """File of rows: .jsonl .csv .tsv .parquet."""
    out: str = ""
    """File to write: .parquet or .jsonl with the rows and a field `embedding`, or .npy with the vectors alone."""
    text_field: str = "text"
    """Field that holds the text."""
    layer: int = -1
    """Hidden states after this many blocks, 0: the token embeddings; -1: after all blocks and the final norm."""
    pooling: Literal["mean", "last"] = "mean"
    """The mean over a text's positions, or the last one."""
    normalized: bool = False
    """Make vectors of length 1."""
    batch_size: int = 16
    """Texts in a batch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matmul operands and activations."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("run_dir", "file", "out"):
            if not getattr(self, name):
                raise UserError(f"{name} is missing; gptjax embed --run_dir DIR --file IN.jsonl --out OUT.parquet")
        usable_paths("", self, "run_dir", "file", "out")
        positive("", self, "batch_size")
        if not self.out.endswith((".parquet", ".jsonl", ".npy")):
            raise UserError(f"out={self.out!r} must end in .parquet, .jsonl or .npy")


def no_empty_text(config, name: str) -> None:
    """Refuses a list with an empty text.

    Raises:
        UserError: Naming the option.
    """
    if "" in getattr(config, name):
        raise UserError(f"{name} holds an empty text; give at least one character, or leave it out")


def token_biases(options: DecodingConfig) -> dict[int, float]:
    """The bias of each token id that `logit_bias` names.

    Raises:
        UserError: An entry has another form, is not finite, or names a token twice.
    """
    biases: dict[int, float] = {}
    for entry in options.logit_bias:
        token, _, value = entry.partition("=")
        try:
            number, bias = int(token), float(value)
        except ValueError:
            raise UserError(f"logit_bias: {entry!r} must be TOKEN_ID=VALUE, such as 50256=-5") from None
        if number < 0 or not abs(bias) <= LARGEST_BIAS:
            raise UserError(
                f"logit_bias: {entry!r} needs an id from 0 on and a value in [-{LARGEST_BIAS}, {LARGEST_BIAS}]"
            )
        if number in biases:
            raise UserError(f"logit_bias: token {number} is given twice")
        biases[number] = bias
    return biases


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
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self):
        super().__post_init__()
        if not self.run_dir:
            raise UserError("run_dir is missing; name the folder of a trained run")
        usable_paths("", self, "run_dir")
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

    def _check_benchmark(self):
        asked = self.benchmark != "none"
        no_effect("", self, "shots", asked, "benchmark")
        for name in ("shots_path", "seed"):
            no_effect("", self, name, self.shots > 0, "shots")
        for name in ("max_new_tokens", "stop", "pattern", "text_scores"):
            no_effect("", self, name, self.benchmark == "generate", "benchmark=generate")
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
    """Labels texts with a model that was trained for it; the result is JSONL."""

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
        positive("", self, "batch_size")
        no_effect("", self, "out", bool(self.file), "file")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What prepare does besides; options of the run follow, as for train."""

    shard: str = ""
    """I/N: only clean part I (from 1) of N of the corpus, into a cache_dir that N machines share; then run prepare
    without it."""

    def __post_init__(self):
        if self.shard and not (
            re.fullmatch(r"\d{1,6}/\d{1,6}", self.shard)
            and 1 <= int(self.shard.split("/")[0]) <= int(self.shard.split("/")[1])
        ):
            raise UserError(f"shard={self.shard!r} must be like 1/4: a number from 1 and the number of machines")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyResumeConfig:
    """How a run is killed and resumed; options of the run itself may follow, as for train."""

    steps: int = 20
    """Steps of the killed run and of the one that it is compared with."""
    save_every: int = 4
    """Steps between checkpoints."""
    kills: int = 4
    """Number of SIGKILLs at random moments, before the run may finish."""
    kill_seed: int = 0
    """Random seed of the moments."""

    def __post_init__(self):
        positive("", self, "steps", "save_every", "kills")
        not_negative("", self, "kill_seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The chips that a run is planned for; options of the run itself may follow, as for train."""

    devices: int
    """Number of chips, up to 512."""
    chip: str
    """h100, h100-pcie, h100-nvl, h200, h200-nvl, gh200, b200, gb200, a100, a100-pcie, a100-40gb, a100-40gb-pcie, l4,
    l40, l40s, v4, v5e, v5p or v6e."""
    json: bool = False
    """Print one JSON object, in bytes, FLOPs and seconds."""

    def __post_init__(self):
        positive("", self, "devices")
        if self.devices > MOST_DEVICES:
            raise UserError(f"devices={self.devices} must be at most {MOST_DEVICES}")
        if self.chip not in CHIP_NAMES:
            raise UserError(
                f"chip={self.chip!r} must be one of {', '.join(CHIP_NAMES)}.{did_you_mean(self.chip, CHIP_NAMES)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Places to verify in full; the machine is described in any case."""

    check: tuple[str, ...] = ()
    """Config files, run directories and folders of prepared data; the option's name may be left out."""
    all_data: bool = False
    """Verify every data set in cache_dir too."""
    cache_dir: str = Config.cache_dir
    """Cache of prepared data and compiled programs to look at."""

    def __post_init__(self):
        usable_paths("", self, "check", "cache_dir")
        local_folders("", self, "cache_dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The runs that are shown and where the page goes."""

    runs: tuple[str, ...] = ()
    """Run directories; several are compared. The option's name may be left out."""
    out: str = ""
    """File to write; empty: report.html in the run directory, or comparison.html in this folder for several runs."""
    png: str = ""
    """Folder for the charts as PNG files."""

    def __post_init__(self):
        if not self.runs:
            raise UserError("no run is named; give the folder of one run, or of several to compare them")
        usable_paths("", self, "runs", "out", "png")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectConfig(CheckpointConfig):
    """The text that a model is inspected on."""

    text: str = ""
    """The text; at most model.block_size tokens, and at most 512."""
    out: str = ""
    """File to write; empty: inspect.html in the run directory."""

    def __post_init__(self):
        super().__post_init__()
        if not self.text:
            raise UserError("text is missing; give --text TEXT")
        usable_paths("", self, "out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How the runs of a sweep are started; options of the runs may follow, as for train."""

    parallel: int = 1
    """Runs at a time; each is a process of its own."""

    def __post_init__(self):
        positive("", self, "parallel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LrFindConfig:
    """The rates that are tried; options of the run itself may follow, as for train."""

    low: float = 1e-6
    """First learning rate."""
    high: float = 1.0
    """Last learning rate; the test ends earlier when the loss rises."""
    steps: int = 200
    """Steps from the first to the last rate."""
    out: str = ""
    """File for the chart; empty: lr_find.html in this folder."""

    def __post_init__(self):
        if not 0 < self.low < self.high:
            raise UserError(f"low={self.low} and high={self.high}: low must be above 0 and below high")
        if self.steps < 10:
            raise UserError(f"steps={self.steps} must be at least 10")
        positive("", self, "steps")
        usable_paths("", self, "out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(CheckpointConfig):
    """How much of a run's validation text is looked at."""

    windows: int = 512
    """Windows of text, evenly spaced; 0: all."""
    batch_size: int = 8
    """Windows in a batch; all logits of a batch are in memory."""
    sample_tokens: int = 128
    """Length of the texts in which repetition is measured; 0: none."""

    def __post_init__(self):
        super().__post_init__()
        not_negative("", self, "windows", "sample_tokens")
        positive("", self, "batch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """How many steps are traced; options of the run itself may follow, as for train."""

    steps: int = 5
    """Steps in the trace, after two that are not in it."""
    out: str = ""
    """New folder to keep the trace in, for TensorBoard or Perfetto."""

    def __post_init__(self):
        positive("", self, "steps")
        usable_paths("", self, "out")
