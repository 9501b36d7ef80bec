"""The config of a run, and checks of options that depend on each other."""

import dataclasses

from gptjax.config.cluster import ClusterConfig
from gptjax.config.data import DataConfig
from gptjax.config.log import LogConfig
from gptjax.config.mesh import MeshConfig
from gptjax.config.mixtures import PartConfig, SourceConfig
from gptjax.config.model import ModelConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.ramps import check_ramp
from gptjax.config.rules import LARGEST_COUNT, local_folders, no_effect, not_negative, usable_paths
from gptjax.config.task import HEADED, LABELLED, FinetuneConfig, TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.train import TrainConfig
from gptjax.errors import UserError

SCORES = {
    "classify": ("accuracy", "macro_f1"),
    "tag": ("accuracy", "macro_f1", "span_f1"),
    "regress": ("pearson", "spearman"),
    "choose": ("accuracy",),
    "answer": ("exact_match", "f1"),
    "reward": ("accuracy",),
    "dpo": ("accuracy",),
}
"""Values of `train.best_by` besides loss, by `task.kind`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    run_dir: str = "runs/default"
    """Run directory: config, metrics, samples and checkpoints. If it has a checkpoint, the run resumes from it."""
    seed: int = 0
    """Seed of initial weights, dropout and the order of the data."""
    init_from: str = ""
    """Run directory of the base model: the run starts from its weights and tokenizer; empty: random weights."""
    cache_dir: str = "~/.cache/gptjax"
    """Folder of prepared data and compiled programs, shared by runs."""
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
    """Instead of weights of sources: shares are proportional to tokens^(1 / temperature); 0: use weights."""

    def __post_init__(self):
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
        if (
            self.task.kind != "pretrain"
            or self.task.objective.rearranges
            or self.model.adapter.kind in ("prompt", "prefix")
        ):
            no_effect("log", self.log, "activations", False, "pretraining that predicts the next token")

    @property
    def heads(self) -> dict[str, TaskConfig]:
        """The tasks with a head, by the name of the head."""
        if self.task.kind == "multi":
            return {part.name: part.task for part in self.parts if part.task.kind in HEADED and not part.head}
        return {self.task.kind: self.task} if self.task.kind in HEADED else {}

    def of_part(self, part: PartConfig) -> "Config":
        """The config of a single task, with the same model."""
        train = "all" if self.model.adapter.kind == "none" else "new"
        windows = self.train.eval_windows if part.task.kind == "pretrain" else TrainConfig.eval_windows
        return dataclasses.replace(
            self,
            task=part.task,
            data=part.data,
            parts=(),
            finetune=FinetuneConfig(train=train),
            train=dataclasses.replace(self.train, eval_windows=windows),
        )

    @property
    def averages_params(self) -> bool:
        """Whether evaluation and sampling use averaged parameters, which a checkpoint then holds too."""
        return self.train.ema > 0 or self.optim.name == "schedule_free"

    @property
    def learned_text(self) -> bool:
        """Whether the run learned to predict text, and not only the outputs of heads."""
        tasks = [part.task for part in self.parts] or [self.task]
        return any(task.kind not in HEADED or task.lm_weight > 0 for task in tasks)

    @property
    def why_no_sample(self) -> str:
        """The reason why the run's model cannot continue text; empty if it can."""
        bidirectional = "model.bidirectional=true, so it does not predict the next token"
        return self.task.objective.why_no_sample or (bidirectional if self.model.bidirectional else "")

    @property
    def why_no_likelihood(self) -> str:
        """Why the run's model gives no probability of a text from left to right; empty: it gives one."""
        if self.model.encoder_layers:
            return "it writes targets of sources"
        if self.task.objective.kind == "prefix":
            return "it learned to read prefixes from both sides"
        return self.why_no_sample or ("" if self.learned_text else "it learned no text; measure the run of init_from")

    def _has_score(self, name: str) -> bool:
        """Whether evaluations of this task have the score `name`; span_f1 exists for BIO tags."""
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
        shared = {name: getattr(self.data, name) for name in ("packing", "attend_across_documents", "verify")}
        if self.data != DataConfig(**shared):
            raise UserError("data: only packing, attend_across_documents and verify have an effect beside sources")
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
            if part.head:
                self._check_shared_head(part)
        if self.task.kind == "multi":
            for field in dataclasses.fields(DataConfig):
                no_effect("data", self.data, field.name, False, "another task.kind; each of parts has data of its own")
        new = labelled or self.model.adapter.kind != "none"
        if rows:
            of_text = any(part.task.kind == "pretrain" for part in self.parts)
            no_effect("train", self.train, "eval_windows", of_text, "task.kind=pretrain")
            for name in (
                "source",
                "template",
                "min_characters",
                "drop_duplicates",
                "clean",
                "git_endings",
                "unreadable_files",
                "license",
                "skip",
                "packing",
                "attend_across_documents",
            ):
                no_effect("data", self.data, name, False, "task.kind=pretrain")
        if self.task.folds or self.task.validation_path:
            no_effect("data", self.data, "validation_fraction", False, "task.folds=0 and an empty task.validation_path")
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
        self._check_average()
        self._check_ramps()
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
        for name in ("base_rate", "mixout"):
            no_effect("finetune", self.finetune, name, bool(self.init_from), "init_from")
        if self.finetune.base_rate and self.optim.learning_rate != OptimConfig.learning_rate:
            raise UserError(
                f"optim.learning_rate={self.optim.learning_rate} and finetune.base_rate={self.finetune.base_rate} both"
                " set the learning rate; leave one out"
            )
        no_effect("finetune", self.finetune, "head_learning_rate", labelled, "a task.kind with a head")

    def _check_average(self) -> None:
        if self.optim.name != "schedule_free":
            return
        no_effect("train", self.train, "ema", False, "another optim.name: schedule_free has an average of its own")
        for name in ("layer_decay", "head_learning_rate"):
            no_effect("finetune", self.finetune, name, False, "another optim.name: schedule_free has one rate")
        no_effect("model", self.model, "mup_base_width", False, "another optim.name: schedule_free has one rate")

    def _check_ramps(self) -> None:
        train, length = self.train, self.model.block_size
        plain = self.task.kind == "pretrain" and not self.task.objective.rearranges and not self.sources
        for name in ("batch_ramp", "length_ramp"):
            no_effect("train", train, name, plain, "task.kind=pretrain on one text, with the next token as objective")
        if train.lengths:
            check_ramp("train.length_ramp", train.lengths, "model.block_size", length)
            for _, tokens in train.lengths:
                if length % tokens:
                    raise UserError(f"train.length_ramp: {tokens} tokens must divide model.block_size={length}")

    def _check_shared_head(self, part: PartConfig) -> None:
        owner = next((other for other in self.parts if other.name == part.head and not other.head), None)
        if owner is None or owner is part:
            raise UserError(f"parts: {part.name}: head={part.head!r} must name another part that has a head of its own")
        if part.task.kind not in LABELLED:
            raise UserError(
                f"parts: {part.name}: head={part.head!r} needs task.kind={' or '.join(LABELLED)}, not {part.task.kind}"
            )
        for field in ("kind", "multi_label", "delimiters", "pooling", "bag_of_words", "layer_mixture"):
            own, others = getattr(part.task, field), getattr(owner.task, field)
            if own != others:
                raise UserError(
                    f"parts: {part.name}: task.{field}={own} must be {others}, as of the part whose head it uses"
                )

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
        """Checks that the objective fits the model. With `init_from`, this is checked later, when its model is
        known.
        """
        objective, model = self.task.objective, self.model
        if self.sources and objective.rearranges:
            raise UserError(f"task.objective.kind={objective.kind} does not go with sources; give one text as data")
        no_effect("data", self.data, "packing", not objective.rearranges, "task.objective.kind=causal or multi_token")
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
            for name in ("attention_window", "attention_sinks"):
                no_effect("model", model, name, False, "tokens in their order: permutation shuffles them")
            if model.attention_stride:
                raise UserError(
                    f"model.attention_stride={model.attention_stride} needs tokens in their order, and"
                    " task.objective.kind=permutation shuffles them; leave it out, and the layers that use it"
                )
