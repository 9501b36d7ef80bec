"""Everything that defines a run, as frozen dataclasses: the only place that knows a default."""

import dataclasses
import math
import re
from typing import Literal

from gptjax.config.clean import CleanConfig
from gptjax.config.cluster import ClusterConfig
from gptjax.config.log import LogConfig
from gptjax.config.model import ModelConfig
from gptjax.config.rules import LARGEST_COUNT, fraction, local_folders, no_effect, not_negative, positive, usable_paths
from gptjax.config.task import HEADED, LABELLED, FinetuneConfig, TaskConfig
from gptjax.errors import UserError, did_you_mean

EXTENSION = re.compile(r"(continue|restart) at (\d{1,10}) of (\d{1,10})")
"""A change of num_steps: how, at which update, and the number of steps that was planned before."""
SCORES = {
    "classify": ("accuracy", "macro_f1"),
    "tag": ("accuracy", "macro_f1", "span_f1"),
    "regress": ("pearson", "spearman"),
    "choose": ("accuracy",),
    "answer": ("exact_match", "f1"),
    "reward": ("accuracy",),
    "dpo": ("accuracy",),
}
"""What `train.best_by` may name beside the loss, by `task.kind`."""
PARTS = ("classify", "regress", "choose", "tag", "instruct")
"""The tasks that can be a part of `multi`."""
TEMPLATE_FIELD = re.compile(r"\{([\w-]+(?:\.[\w-]+)*)\}")
"""A field in `data.template`."""
TIKTOKEN_NAMES = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["bytes", "chars", "tiktoken", "bpe", "wordpiece"] = "tiktoken"
    """bytes; chars: those of the corpus; tiktoken: a published encoding; bpe and wordpiece: trained on the corpus."""
    name: str = "gpt2"
    """Encoding for kind tiktoken: gpt2, r50k_base, p50k_base, cl100k_base or o200k_base."""
    vocab_size: int = 4096
    """Tokens that kinds bpe and wordpiece learn, single bytes and <|endoftext|> included."""

    def __post_init__(self):
        if self.kind == "tiktoken" and self.name not in TIKTOKEN_NAMES:
            raise UserError(
                f"tokenizer.name={self.name!r} must be one of {', '.join(TIKTOKEN_NAMES)}."
                f"{did_you_mean(self.name, TIKTOKEN_NAMES)}"
            )
        if self.vocab_size < 257:
            raise UserError(f"tokenizer.vocab_size={self.vocab_size} must be at least 257: 256 bytes and <|endoftext|>")
        no_effect("tokenizer", self, "name", self.kind == "tiktoken", "tokenizer.kind=tiktoken")
        learned = self.kind in ("bpe", "wordpiece")
        no_effect("tokenizer", self, "vocab_size", learned, "tokenizer.kind=bpe or wordpiece")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from, and how it is cleaned and split. One of path, source and hf_dataset is given."""

    path: tuple[str, ...] = ()
    """Files, folders or globs: .txt .md .py .jsonl .csv .tsv .parquet .conll .conllu .mbox .warc
    .wet, each also .gz or .zst."""
    source: Literal["", "python-stdlib"] = ""
    """A corpus that every machine has: python-stdlib is the running Python's standard library."""
    hf_dataset: str = ""
    """NAME[:CONFIG][@SPLIT] for the datasets library: a local folder or the hub."""
    streaming: bool = False
    """Read hf_dataset as a stream instead of downloading it whole."""
    text_field: str = "text"
    """Field (JSONL), column (CSV, parquet) or feature (datasets) that holds the text."""
    template: str = ""
    """In place of text_field: a text with several fields of a row in braces, nested ones with dots, such as
    "{title}\n\n{body.text}"."""
    encoding: Literal["utf-8", "utf-16", "latin-1", "cp1252"] = "utf-8"
    """Encoding of the files of path; parquet is always UTF-8."""
    quoting: Literal["format", "double", "none"] = "format"
    """Double quotes around fields of CSV and TSV. format: CSV has them, TSV has not; none: they are plain text."""
    max_documents: int = 0
    """Stop reading after this many documents; 0: all."""
    validation_fraction: float = 0.1
    """Share of the text that is used for validation: documents, chosen by hash; of a single document, its end."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """Bytes that are not valid in the encoding: stop, put U+FFFD, or leave the document or row out (counted)."""
    unicode: Literal["keep", "NFC"] = "keep"
    """Unicode normalisation."""
    newlines: Literal["keep", "unix"] = "keep"
    """unix: CRLF and lone CR become LF."""
    min_characters: int = 0
    """Leave out shorter documents (counted)."""
    drop_duplicates: bool = False
    """Leave out documents whose text came before (counted)."""
    clean: CleanConfig = dataclasses.field(default_factory=CleanConfig)
    skip: str = ""
    """File with a document on each line (its hash, or file and line, as `gptjax data` prints them): they are no longer
    trained on, and every other sequence stays the same."""
    attend_across_documents: bool = False
    """Let tokens attend to earlier documents in the same window."""
    verify: Literal["full", "header"] = "full"
    """How prepared data is checked when a run opens it: every byte and every id, or headers and sizes only."""

    def __post_init__(self):
        given = [name for name in ("path", "source", "hf_dataset") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"data.{given[0]} and data.{given[1]} are both set; give one")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1")
        not_negative("data", self, "max_documents", "min_characters")
        usable_paths("data", self, "path", "skip")
        no_effect("data", self, "streaming", bool(self.hf_dataset), "data.hf_dataset")
        for name in ("encoding", "quoting"):
            no_effect("data", self, name, bool(self.path), "data.path")
        no_effect("data", self, "text_field", not self.template, "an empty data.template")
        if self.template and not TEMPLATE_FIELD.search(self.template):
            raise UserError(f"data.template={self.template!r} must name a field in braces, such as {{title}}")
        if self.source:
            for name in ("text_field", "template", "invalid_utf8"):
                no_effect("data", self, name, False, "text of your own")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """adamw (arXiv:1711.05101), lion (arXiv:2302.06675), adafactor (arXiv:1804.04235), or muon: orthogonalised momentum
    for the matrices of blocks, adam for the rest (kellerjordan.github.io/posts/muon)."""
    learning_rate: float = 6e-4
    """Peak, reached after warmup_steps."""
    min_learning_rate: float = 6e-5
    """Where schedule cosine, linear or wsd ends."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_fraction: float = 0.0
    """Linear warm-up as a share of train.num_steps, in place of warmup_steps."""
    warmup_rule: Literal["before_peak", "to_peak"] = "before_peak"
    """Rate at step k of W warm-up steps. before_peak: k / (W + 1) of the peak, which the next step has; to_peak: k / W,
    as papers count, so the last one has the peak."""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """Decay from learning_rate to min_learning_rate. wsd: constant, then linear over the last wsd_decay_fraction of the
    steps (arXiv:2404.06395). inverse_sqrt: with the root of the step, to no end (arXiv:1706.03762, section 5.3)."""
    wsd_decay_fraction: float = 0.2
    """Share of num_steps in which schedule wsd decays."""
    extend: Literal["continue", "restart", "stretch"] = "continue"
    """Learning rate of a run that resumes with another train.num_steps. continue: decays from its present value;
    restart: warms up to learning_rate once more; stretch: as if the run had been planned with the new number."""
    extended: tuple[str, ...] = ()
    """The changes of train.num_steps so far, written by the run itself: 'continue at 1000 of 1000' means that the
    schedule planned for 1000 steps was continued at update 1000."""
    weight_decay: float = 0.1
    """Decoupled, on matrices and embeddings only."""
    beta1: float = 0.9
    """Decay of the running mean of gradients; lion: weight of that mean in the update."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients; lion: decay of the running mean of gradients."""
    eps: float = 1e-8
    """Added to the denominator of adam."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices that muon trains; learning_rate is that of all else."""
    muon_beta: float = 0.95
    """Decay of muon's momentum."""
    factored_decay: float = 0.8
    """adafactor: exponent of the decay of its second moments."""
    embedding_rate: float = 1.0
    """Factor of the learning rate of token embeddings."""
    head_rate: float = 1.0
    """Factor of the learning rate of an output projection that is not tied."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""

    def __post_init__(self):
        not_negative(
            "optim",
            self,
            "learning_rate",
            "min_learning_rate",
            "warmup_steps",
            "weight_decay",
            "eps",
            "grad_clip",
        )
        positive("optim", self, "muon_learning_rate", "embedding_rate", "head_rate")
        fraction("optim", self, "beta1", "beta2", "muon_beta", "factored_decay")
        if not 0 < self.wsd_decay_fraction <= 1:
            raise UserError(f"optim.wsd_decay_fraction={self.wsd_decay_fraction} must lie in (0, 1]")
        if self.schedule in ("cosine", "linear", "wsd") and self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"optim.min_learning_rate={self.min_learning_rate} must not exceed"
                f" optim.learning_rate={self.learning_rate}"
            )
        no_effect("optim", self, "wsd_decay_fraction", self.schedule == "wsd", "optim.schedule=wsd")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"optim.warmup_fraction={self.warmup_fraction} must lie in [0, 1]")
        if self.warmup_steps and self.warmup_fraction:
            raise UserError("optim.warmup_steps and optim.warmup_fraction are both set; give one")
        warms_up = bool(self.warmup_steps or self.warmup_fraction)
        no_effect("optim", self, "warmup_rule", warms_up, "optim.warmup_steps or optim.warmup_fraction")
        if self.schedule == "inverse_sqrt" and not warms_up:
            raise UserError("optim.schedule=inverse_sqrt decays from the end of warm-up; give optim.warmup_steps")
        for name in ("extend", "extended"):
            no_effect("optim", self, name, self.depends_on_length, "a schedule that depends on train.num_steps")
        for change in self.extended:
            if not EXTENSION.fullmatch(change):
                raise UserError(f"optim.extended: {change!r} must be like 'continue at 1000 of 1000'")
        ends = self.schedule in ("cosine", "linear", "wsd")
        no_effect("optim", self, "min_learning_rate", ends, "optim.schedule=cosine, linear or wsd")
        no_effect("optim", self, "eps", self.name in ("adamw", "muon"), "optim.name=adamw or muon")
        for name in ("muon_learning_rate", "muon_beta"):
            no_effect("optim", self, name, self.name == "muon", "optim.name=muon")
        no_effect("optim", self, "factored_decay", self.name == "adafactor", "optim.name=adafactor")
        for name in ("beta1", "beta2"):
            no_effect("optim", self, name, self.name != "adafactor", "moments that decay by a constant")
        if self.name == "muon" and not self.learning_rate:
            raise UserError("optim.learning_rate=0 with optim.name=muon: the rate of embeddings must be above 0")

    @property
    def depends_on_length(self) -> bool:
        """Whether the learning rate of a step depends on train.num_steps."""
        return self.schedule in ("cosine", "linear", "wsd") or self.warmup_fraction > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: length, batch size, precision, and when to log, evaluate and save."""

    num_steps: int = 1000
    """Steps of the run: batches that it trains on, each one an optimizer update."""
    num_epochs: float = 0.0
    """Length of the run in passes over the training data, in place of num_steps; the run's own config.yaml has the
    steps."""
    batch_size: int = 16
    """Sequences per step, over all devices."""
    micro_batch_size: int = 0
    """Sequences per forward pass, over all devices; gradients add up to batch_size. 0: batch_size."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameters and optimizer moments."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of matmul operands; float16 uses a dynamic loss scale. auto: bfloat16 where the machine has instructions for
    it, else float32; the run's own config.yaml has the choice."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-normalizer (arXiv:2204.02311, section 5)."""
    spike_sigma: float = 20.0
    """Skip the update of a step whose loss or gradient norm is this many deviations above its mean; 0: never."""
    max_skipped_in_a_row: int = 10
    """Stop after this many skipped updates in a row, and write diverged.json."""
    ema: float = 0.0
    """Decay of an exponential moving average of the parameters, used for evaluation and sampling; 0: none."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matmuls (dots), or whole blocks."""
    unroll: int = 0
    """Blocks per iteration of the loop over layers; 0: all. Higher values run faster and compile more slowly."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between evaluations; 0: only at the end."""
    eval_windows: int = 512
    """Validation windows in an evaluation, evenly spaced and always the same; 0: all."""
    save_every: int = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the best one is kept too."""
    strict_checkpoints: bool = False
    """Refuse to resume where the newest checkpoint is damaged, instead of using an older one."""
    allow_data_change: bool = False
    """Resume with other data or another batch_size; text that was trained on may be repeated."""
    best_by: Literal[
        "loss", "accuracy", "macro_f1", "span_f1", "pearson", "spearman", "exact_match", "f1", "metric"
    ] = "loss"
    """What decides which checkpoint is the best: the lowest validation loss, or a task's highest score;
    metric: what task.metric returns."""
    patience: int = 0
    """Stop after this many evaluations without a new best one; 0: never."""
    sample_prompt: str = "\n"
    """Prompt of the sample at each evaluation."""
    sample_tokens: int = 64
    """Length of that sample; 0: none."""

    def __post_init__(self):
        positive("train", self, "num_steps", "batch_size", "log_every", "keep_checkpoints", "max_skipped_in_a_row")
        not_negative(
            "train",
            self,
            "micro_batch_size",
            "unroll",
            "eval_every",
            "eval_windows",
            "save_every",
            "patience",
        )
        not_negative("train", self, "z_loss", "sample_tokens", "spike_sigma", "num_epochs")
        no_effect("train", self, "num_steps", not self.num_epochs, "train.num_epochs=0")
        fraction("train", self, "label_smoothing", "ema")
        if self.batch_size % self.micro_batch:
            raise UserError(
                f"train.batch_size={self.batch_size} must be divisible by"
                f" train.micro_batch_size={self.micro_batch_size}"
            )
        if self.sample_tokens and not self.sample_prompt:
            raise UserError("train.sample_prompt is empty; give a text, or train.sample_tokens=0 for no samples")

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass, with the default resolved."""
        return self.micro_batch_size or self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each axis; at most one axis is -1: all devices that are left."""

    data: int = -1
    """Data parallel: each device has its own sequences."""
    fsdp: int = 1
    """Data parallel with parameters and optimizer state sharded over the devices."""
    tensor: int = 1
    """Heads, MLP width and vocabulary sharded over the devices."""
    context: int = 1
    """Positions of each sequence sharded over the devices; keys and values are passed around the ring."""
    stage: int = 1
    """Pipeline stages: layers sharded over the devices, which micro-batches pass one after another."""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{name}={size} must be positive, or -1 for all devices that are left")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"mesh: only one axis may be -1, not {[n for n, s in sizes.items() if s == -1]}")

    @property
    def size(self) -> int:
        """Devices that the axes take, one that is -1 left out."""
        return math.prod(size for size in dataclasses.asdict(self).values() if size != -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartConfig:
    """One of several tasks that share a model."""

    name: str
    """Name of the part's head and scores: letters, digits, - and _."""
    weight: float = 1.0
    """Weight of the part's mean loss in the sum that is minimised."""
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"parts: name={self.name!r} must be of letters, digits, - and _")
        positive(f"parts: {self.name}", self, "weight")
        if self.task.kind not in PARTS:
            raise UserError(f"parts: {self.name}: task.kind={self.task.kind} must be one of {', '.join(PARTS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of text that a run mixes."""

    name: str
    """Name of the source in log lines and metrics: letters, digits, - and _."""
    weight: float = 1.0
    """Share of the sequences, relative to the weights of the other sources; 0: only after a change."""
    changes: tuple[str, ...] = ()
    """Weights from later steps on, as STEP:WEIGHT."""
    epochs: float = 0.0
    """In place of weights, for every source: passes over its text, relative to those of the other sources."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self):
        where = f"sources: {self.name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"sources: name={self.name!r} must be of letters, digits, - and _")
        not_negative(where, self, "weight", "epochs")
        for change in self.changes:
            if not re.fullmatch(r"[1-9]\d{0,9}:\d+(\.\d+)?", change):
                raise UserError(f"{where}: changes={change!r} must be like 1000:0.5, a step above 0 and a weight")
        if self.epochs and (self.weight != 1 or self.changes):
            raise UserError(f"{where}: weight and changes have no effect with epochs={self.epochs}; give one of them")
        for name in ("attend_across_documents", "verify"):
            no_effect(f"{where}: data", self.data, name, False, "a run of one source; set it in the run's own data")

    @property
    def weight_changes(self) -> dict[int, float]:
        """The weights of `changes` by their step."""
        return {int(step): float(weight) for step, _, weight in (change.partition(":") for change in self.changes)}

    def weight_at(self, step: int) -> float:
        """The weight at a step."""
        return [w for s, w in sorted({0: self.weight, **self.weight_changes}.items()) if s <= step][-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    run_dir: str = "runs/default"
    """Folder of config, metrics, samples and checkpoints; a run that has a checkpoint resumes from it."""
    seed: int = 0
    """Seed of initial weights, dropout and the order of the data."""
    init_from: str = ""
    """Run directory whose weights and tokenizer the run starts from."""
    cache_dir: str = "~/.cache/gptjax"
    """Prepared data and compiled programs, shared by runs."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    parts: tuple[PartConfig, ...] = ()
    """The tasks of task.kind=multi, each with name, weight, task and data of its own; a list in the file, no flag."""

    sources: tuple[SourceConfig, ...] = ()
    """Several sources of text to mix, each with name, weight and data of its own; a list in the file, no flag."""
    mixture_temperature: float = 0.0
    """In place of weights: sources have shares in proportion to their tokens to the power of 1 / temperature."""

    def __post_init__(self):
        if not self.run_dir:
            raise UserError("run_dir is empty; name a folder for the run")
        usable_paths("", self, "run_dir", "init_from", "cache_dir")
        local_folders("", self, "run_dir", "cache_dir")
        if self.init_from == self.run_dir:
            raise UserError(f"init_from={self.init_from} is the run_dir itself; a run resumes without it")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must lie in [0, 2**32)")
        if self.train.batch_size * self.model.block_size > LARGEST_COUNT:
            raise UserError(
                f"train.batch_size={self.train.batch_size} times model.block_size={self.model.block_size}"
                f" must be at most {LARGEST_COUNT} tokens"
            )
        self._check_task()
        self._check_sources()

    @property
    def heads(self) -> dict[str, TaskConfig]:
        """The tasks that have a head, by the name of the head."""
        if self.task.kind == "multi":
            return {part.name: part.task for part in self.parts if part.task.kind in HEADED}
        return {self.task.kind: self.task} if self.task.kind in HEADED else {}

    def of_part(self, part: PartConfig) -> "Config":
        """The config of one task alone, under the same model."""
        train = "all" if self.model.adapter.kind == "none" else "new"
        return dataclasses.replace(self, task=part.task, data=part.data, parts=(), finetune=FinetuneConfig(train=train))

    @property
    def why_no_sample(self) -> str:
        """Why the run's model cannot continue text; empty: it can."""
        bidirectional = "model.bidirectional=true, so it does not predict the next token"
        return self.task.objective.why_no_sample or (bidirectional if self.model.bidirectional else "")

    def _has_score(self, name: str) -> bool:
        """Whether evaluations of this task have the score that `train.best_by` names; span_f1: where tags are BIO."""
        if name == "metric":
            return bool(self.task.metric)
        return name == "loss" or name in SCORES.get(self.task.kind, ())

    def _check_sources(self) -> None:
        no_effect("", self, "mixture_temperature", bool(self.sources), "sources")
        not_negative("", self, "mixture_temperature")
        if not self.sources:
            return
        names = [source.name for source in self.sources]
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError("sources must be two or more, each with another name; for one, give data")
        if self.task.kind != "pretrain":
            raise UserError(f"sources have no effect with task.kind={self.task.kind}; leave them out, or use parts")
        shared = DataConfig(attend_across_documents=self.data.attend_across_documents, verify=self.data.verify)
        if self.data != shared:
            raise UserError("data: only attend_across_documents and verify have an effect beside sources")
        weighted = any(source.weight != 1 or source.changes for source in self.sources)
        with_epochs = [source.epochs > 0 for source in self.sources]
        if any(with_epochs) and (not all(with_epochs) or self.mixture_temperature):
            raise UserError("sources: give epochs for every source, without mixture_temperature, or for none")
        if self.mixture_temperature and weighted:
            raise UserError("mixture_temperature replaces the weights of sources: leave weight and changes out")
        for step in {0, *(step for source in self.sources for step in source.weight_changes)}:
            if not any(source.weight_at(step) for source in self.sources):
                raise UserError(f"sources: all weights are 0 from step {step} on")

    def _check_task(self) -> None:
        labelled, rows = bool(self.heads), self.task.kind != "pretrain"
        names = [part.name for part in self.parts]
        if (self.task.kind == "multi") != (len(names) > 1) or len(set(names)) < len(names):
            raise UserError("task.kind=multi needs two parts or more, each with another name; other tasks have none")
        for part in self.parts:
            self.of_part(part)
        if self.task.kind == "multi":
            for field in dataclasses.fields(DataConfig):
                no_effect("data", self.data, field.name, False, "another task.kind; each of parts has data of its own")
        new = labelled or self.model.adapter.kind != "none"
        if rows:
            no_effect("train", self.train, "eval_windows", False, "task.kind=pretrain")
            for name in (
                "source",
                "template",
                "min_characters",
                "drop_duplicates",
                "clean",
                "skip",
                "attend_across_documents",
            ):
                no_effect("data", self.data, name, False, "task.kind=pretrain")
        if not self._has_score(self.train.best_by):
            no_effect("train", self.train, "best_by", False, "a task that has such a score")
        if self.task.kind in HEADED:
            no_effect("train", self.train, "z_loss", False, "a task that predicts tokens")
            no_effect("train", self.train, "sample_prompt", False, "a task that predicts tokens")
            if self.task.multi_label or self.task.loss or self.task.kind not in (*LABELLED, "answer"):
                no_effect("train", self.train, "label_smoothing", False, "one label a text")
        if self.task.kind == "reinforce" and self.train.batch_size % self.task.group_size:
            raise UserError(
                f"train.batch_size={self.train.batch_size} must be a multiple of task.group_size={self.task.group_size}"
            )
        if self.task.kind in ("dpo", "reinforce"):
            for name in ("z_loss", "label_smoothing"):
                no_effect("train", self.train, name, False, "a task that predicts tokens or labels")
            if not self.init_from:
                raise UserError(
                    f"task.kind={self.task.kind} compares the model with the one it starts from; name it as init_from"
                )
        self._check_objective()
        self._check_encoder()
        if self.finetune.train != "all" and not self.init_from:
            raise UserError(
                f"finetune.train={self.finetune.train} would freeze parameters that were drawn at random; name the run"
                " to start from as init_from"
            )
        if self.finetune.train == "new" and not new:
            raise UserError(
                "finetune.train=new: nothing would be trained; set model.adapter.kind, or a task.kind with a head"
            )
        if self.model.adapter.kind != "none" and self.finetune.train not in ("new", "paths"):
            raise UserError(
                f"finetune.train={self.finetune.train} would train the model under its"
                f" {self.model.adapter.kind} adapter; set finetune.train=new (or paths)"
            )
        no_effect("finetune", self.finetune, "base_rate", bool(self.init_from), "init_from")
        if self.finetune.base_rate and self.optim.learning_rate != OptimConfig.learning_rate:
            raise UserError(
                f"optim.learning_rate={self.optim.learning_rate} and finetune.base_rate={self.finetune.base_rate} both"
                " set the learning rate; leave one out"
            )
        no_effect("finetune", self.finetune, "head_learning_rate", labelled, "a task.kind with a head")

    def _check_encoder(self) -> None:
        pairs, layers = self.task.kind == "seq2seq", self.model.encoder_layers
        if layers and not pairs:
            raise UserError(f"model.encoder_layers={layers} has no effect with task.kind={self.task.kind}; seq2seq has")
        if pairs and not layers and not self.init_from:
            raise UserError("task.kind=seq2seq needs model.encoder_layers, as many as model.n_layer for example")
        if pairs and self.finetune.train != "all":
            raise UserError(f"finetune.train={self.finetune.train} does not go with task.kind=seq2seq; leave it at all")
        if pairs:
            no_effect("train", self.train, "sample_prompt", False, "a task.kind that continues text")
            no_effect("data", self.data, "text_field", False, "a task.kind that reads it: seq2seq has source_field")

    def _check_objective(self) -> None:
        """Holds the objective against the model; what `init_from` decides is checked when its model is known."""
        objective, model = self.task.objective, self.model
        if self.sources and objective.rearranges:
            raise UserError(f"task.objective.kind={objective.kind} does not go with sources; give one text as data")
        if objective.why_no_sample:
            no_effect("train", self.train, "sample_prompt", False, f"a model that continues text: {objective.kind} not")
        if objective.kind == "masked" and not model.bidirectional and not self.init_from:
            raise UserError("task.objective.kind=masked needs model.bidirectional=true: it predicts from both sides")
        kinds = {part.task.kind for part in self.parts} or {self.task.kind}
        weighs_tokens = self.task.kind in HEADED and self.task.lm_weight > 0
        if model.bidirectional and (weighs_tokens or not (kinds <= set(HEADED) or objective.kind == "masked")):
            learned = f"task.kind={self.task.kind}, task.objective.kind={objective.kind}"
            raise UserError(
                f"model.bidirectional=true: {learned} would see its targets; leave it out, or choose"
                " task.objective.kind=masked, task.kind=classify or tag"
            )
        if objective.kind == "permutation":
            if model.positions not in ("learned", "sinusoidal", "rope"):
                raise UserError(
                    f"model.positions={model.positions}: task.objective.kind=permutation shuffles tokens, so it needs"
                    " positions of tokens: learned, sinusoidal or rope"
                )
            no_effect("model", model, "attention_window", False, "tokens in their order: permutation shuffles them")
