"""Builds the parts of a run from its config, and checks that they fit together, before anything expensive starts."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import __version__
from gptjax.checkpoints.checkpoint import FOLDER, Checkpoints
from gptjax.checkpoints.choice import choose
from gptjax.checkpoints.manifest import Manifest
from gptjax.checkpoints.run_dir import (
    CONFIG_FILE,
    LoadedRun,
    check_finite,
    frozen_params,
    load_run,
    on_one_device,
    write_description,
)
from gptjax.config.cluster import ClusterConfig
from gptjax.config.model import ModelConfig
from gptjax.config.reader import differing_fields, load_config, to_flat
from gptjax.config.run import Config
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.train import TrainConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import are_spans
from gptjax.machine.native.build import begin as begin_kernels
from gptjax.parallel import cluster
from gptjax.parallel.fits import check_fits
from gptjax.parallel.mesh import make_mesh, replicated, traced_in
from gptjax.parallel.place import put
from gptjax.parallel.rules import shardings
from gptjax.report.metrics import plain
from gptjax.report.progress import say
from gptjax.report.sinks import check_installed
from gptjax.tasks.heads import output_count
from gptjax.tasks.multi import parts_of
from gptjax.tasks.registry import make_task, read_source, with_labels
from gptjax.tasks.task import Source, Task
from gptjax.tasks.trainable import without_heads
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.training.in_flight import BatchHook
from gptjax.training.optim import make_schedule
from gptjax.training.precision import compute_dtype
from gptjax.training.step import TrainState, compute_options, init_state, jit_train_step

# Fields that may change when a run resumes: they change neither the meaning of parameters nor the order of the data.
RESUMABLE = (
    *(
        "run_dir",
        "cache_dir",
        "cluster.",
        "log.",
        "optim.",
        "mesh.",
        "train.num_steps",
        "train.log_every",
        "train.eval_every",
    ),
    *("train.eval_windows", "train.save_every", "train.keep_checkpoints", "train.patience", "train.sample_"),
    "train.best_by",
    *("train.remat", "train.unroll", "train.micro_batch_size", "train.spike_sigma", "train.max_skipped_in_a_row"),
    *("train.strict_checkpoints", "train.allow_data_change", "data.verify", "data.skip"),
    *("finetune.layer_decay", "finetune.head_learning_rate"),
)
EXTEND = ("continue", "restart", "stretch")
"""The values of `optim.extend`."""
OWN_FIELDS = ("cluster.", "cache_dir")  # may differ between the processes of a run
DATA_FIELDS = (
    "data.",
    "sources",
    "mixture_temperature",
    "train.batch_size",
)  # may change too where train.allow_data_change says so


@dataclasses.dataclass
class Loop:
    """What the loop knows besides the train state; it is stored in the checkpoint."""

    best_loss: float = math.inf
    """Validation loss of the best evaluation."""
    evaluations_since_best: int = 0
    best_score: float | None = None
    """Score of the best evaluation, by `best_by`; None: there was none, or `best_by` is the loss."""
    best_by: str = "loss"
    """As `train.best_by` was."""
    measured_on: str = ""
    """Identity of the validation data; empty: unknown."""
    evaluation_pending: bool = False
    """Whether the evaluation of the last step was abandoned, so that it is made when the run resumes."""

    def take(self, val_loss: float, score: float | None) -> bool:
        """Counts an evaluation; returns whether it is the best so far."""
        rank, best = (val_loss,), (self.best_loss,)
        if score is not None:
            rank = (-score, val_loss)
            best = (math.inf if self.best_score is None else -self.best_score, self.best_loss)
        if rank < best:
            self.best_loss, self.best_score, self.evaluations_since_best = val_loss, score, 0
            return True
        self.evaluations_since_best += 1
        return False


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that a run consists of."""

    config: Config
    run_dir: Path
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    task: Task
    train_step: Any
    """Jitted; the state is donated."""
    checkpoints: Checkpoints
    evaluation_hook: BatchHook
    """Called before each batch of an evaluation."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a batch; on average, where batches differ."""
        return tokens_per_step(self.config, self.task)


def build(config: Config, run_dir: Path) -> tuple[Parts, TrainState, Loop]:
    """Prepares data, tokenizer, mesh, compiled functions and the first or the restored state.

    The run directory is changed only if there are steps to train.

    Raises:
        UserError: Something in the config, the data or the run directory does not fit.
    """
    _check_same_program(config)
    with cluster.all_or_none():
        check_installed(config.log)
    config = dataclasses.replace(config, cluster=ClusterConfig())  # the run may resume in another one
    with cluster.all_or_none():
        mesh = make_mesh(config.mesh)
        begin_kernels(mesh.size)
        config = with_compute_dtype(config, run_dir)
        if not config.init_from:  # else the base has the shape
            check_fits(config, mesh)
        base = _base_run(config)
        source = read_source(config, base.tokenizer if base else None)
        source = dataclasses.replace(source, base=base.params if base else None)
        config = _resolve(config, source, base)
        check_fits(config, mesh)
        task, hook = _make_task(config, source, mesh)
        config = with_steps(config, task)
    checkpoints = Checkpoints(run_dir, config.train.keep_checkpoints, say, config.train.best_by)
    choice = checkpoints.newest(config.train.strict_checkpoints)
    with cluster.all_or_none():
        config = with_extension(config, run_dir, choice.manifest)
        _check_run_dir(config, run_dir)
        state_shardings = shardings(mesh, jax.eval_shape(lambda: init_state(config)))
        parts = Parts(
            config=config,
            run_dir=run_dir,
            mesh=mesh,
            tokenizer=source.tokenizer,
            task=task,
            train_step=jit_train_step(config, mesh, state_shardings),
            checkpoints=checkpoints,
            evaluation_hook=hook,
        )
    facts = {"the data": parts.task.data_hash, "the tokenizer": source.tokenizer.fingerprint}
    cluster.require_same(facts | {"train.compute_dtype": config.train.compute_dtype}, "give all of them the same files")
    state, loop = _start(parts, base, choice.manifest)
    with cluster.all_or_none():
        try:
            if cluster.is_first() and not why_finished(parts, int(state.step), loop):
                checkpoints.set_aside_damaged(choice)
                write_description(run_dir, config, source.tokenizer, base)
        except OSError as error:
            raise UserError(f"run_dir={run_dir} cannot be written to: {error.strerror}") from None
    return parts, state, loop


def why_finished(parts: Parts, step: int, loop: Loop) -> str:
    """Says why a run has no steps to train; empty: it has."""
    train = parts.config.train
    if step >= train.num_steps:
        return (
            f"{parts.run_dir}: is at step {step} already; to train longer, raise train.num_steps={train.num_steps}"
            " (optim.extend decides the learning rate)"
        )
    if stopped_early(parts.config, loop):
        return (
            f"{parts.run_dir}: stopped early at step {step}: {loop.evaluations_since_best} evaluations without a new"
            f" best {train.best_by}; to train longer, raise train.patience={train.patience} or set it to 0"
        )
    return ""


def stopped_early(config: Config, loop: Loop) -> bool:
    """Whether `train.patience` ends the run."""
    return 0 < config.train.patience <= loop.evaluations_since_best


def _check_same_program(config: Config) -> None:
    """Holds the processes' versions and configs against each other."""
    fields = {name: value for name, value in to_flat(config).items() if not name.startswith(OWN_FIELDS)}
    versions = {"the version of gptjax": __version__, "the version of jax": jax.__version__}
    cluster.require_same(versions | fields, "start all of them with the same command and config")


def _base_run(config: Config) -> LoadedRun | None:
    """The run that `init_from` names."""
    if not config.init_from:
        return None
    return load_run(Path(config.init_from).expanduser(), strict=config.train.strict_checkpoints, notify=say)


def with_compute_dtype(config: Config, run_dir: Path) -> Config:
    """Resolves "auto": a run resumes in the type that it started with, whatever the machine."""
    chosen = config.train.compute_dtype
    if chosen == "auto" and (run_dir / CONFIG_FILE).exists():
        chosen = load_config(run_dir / CONFIG_FILE).train.compute_dtype
    return dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype=compute_dtype(chosen)))


def _resolve(config: Config, source: Source, base: LoadedRun | None) -> Config:
    """Fills in what only the tokenizer, the labels and the base model know, and checks that they fit."""
    vocab_size = source.tokenizer.vocab_size
    if base is not None:
        if base.config.model.vocab_size < vocab_size:
            raise UserError(
                f"init_from={config.init_from}: its model knows {base.config.model.vocab_size} tokens,"
                f" the tokenizer has {vocab_size}"
            )
        if config.tokenizer not in (TokenizerConfig(), base.config.tokenizer):
            raise UserError(
                f"tokenizer.kind={config.tokenizer.kind!r} has no effect with init_from={config.init_from}, whose"
                f" tokenizer ({base.config.tokenizer.kind}) is used; leave the tokenizer's options out"
            )
        config = dataclasses.replace(config, model=_base_shape(config, base), tokenizer=base.config.tokenizer)
        config = with_base_rate(config, base.config.optim.learning_rate)
    elif config.model.vocab_size == 0:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    if config.model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {vocab_size};"
            " leave it out, or raise it"
        )
    for part in parts_of(config).values():
        if part.task.max_tokens > config.model.block_size:
            raise UserError(
                f"task.max_tokens={part.task.max_tokens} must be at most model.block_size={config.model.block_size}"
            )
    if config.task.objective.kind == "masked" and not config.model.bidirectional:
        raise UserError(
            f"init_from={config.init_from}: was trained with model.bidirectional=false;"
            " task.objective.kind=masked predicts from both sides"
        )
    if config.task.kind == "seq2seq" and not config.model.encoder_layers:
        raise UserError(f"init_from={config.init_from}: has no encoder, which task.kind=seq2seq needs")
    if config.finetune.train == "top" and config.finetune.top_k > config.model.n_layer:
        raise UserError(f"finetune.top_k={config.finetune.top_k} must be at most model.n_layer={config.model.n_layer}")
    config = with_labels(config, source.examples)
    if config.train.best_by == "span_f1" and not are_spans(config.task.labels):
        raise UserError("train.best_by='span_f1' needs tags of the form B-x, I-x and O; choose accuracy or macro_f1")
    other = config.heads or config.task.objective.why_no_sample or config.model.encoder_layers
    if config.train.sample_tokens and not other:
        train = dataclasses.replace(config.train, sample_prompt=_sample_prompt(config, source.tokenizer))
        config = dataclasses.replace(config, train=train)
    return config


def with_base_rate(config: Config, rate_of_base: float) -> Config:
    """Turns `finetune.base_rate` into `optim.learning_rate`, and prints it."""
    share = config.finetune.base_rate
    if not share:
        return config
    rate = share * rate_of_base
    say(f"rate        {rate:.3g} = finetune.base_rate {share:g} x {rate_of_base:.3g} of {config.init_from}")
    least = min(config.optim.min_learning_rate, rate / 10)
    optim = dataclasses.replace(config.optim, learning_rate=rate, min_learning_rate=least)
    return dataclasses.replace(config, optim=optim, finetune=dataclasses.replace(config.finetune, base_rate=0.0))


def _sample_prompt(config: Config, tokenizer: Tokenizer) -> str:
    """`train.sample_prompt`; in place of the default, where the tokenizer has no newline, its first character.

    Raises:
        UserError: The tokenizer cannot encode the prompt that was given: now, not at the first evaluation.
    """
    prompt = config.train.sample_prompt
    try:
        tokenizer.encode(prompt)
    except UserError as error:
        if prompt == TrainConfig.sample_prompt:
            return tokenizer.decode([0])
        raise UserError(f"train.sample_prompt={prompt!r}: {error}") from None
    return prompt


def _base_shape(config: Config, base: LoadedRun) -> ModelConfig:
    """The base model's shape; the config may name only what does not change it, or what agrees with it."""
    default = type(config.model)()
    if base.config.model.adapter.kind != "none":
        raise UserError(
            f"init_from={config.init_from}: has a {base.config.model.adapter.kind} adapter of its own; start from the"
            " run under it, or merge the two with gptjax export --merge true and import the result"
        )
    shape = dataclasses.replace(base.config.model, dropout=config.model.dropout, adapter=config.model.adapter)
    for field in dataclasses.fields(default):
        wanted, has = getattr(config.model, field.name), getattr(shape, field.name)
        if wanted not in (getattr(default, field.name), has):
            raise UserError(
                f"model.{field.name}={wanted} differs from {has} of init_from={config.init_from}; leave it out"
            )
    return shape


def _check_run_dir(config: Config, run_dir: Path) -> None:
    """Refuses to resume a run with a config that has another meaning."""
    if not (run_dir / CONFIG_FILE).exists():
        return
    changed = differing_fields(load_config(run_dir / CONFIG_FILE), config)
    allowed = RESUMABLE + (DATA_FIELDS if config.train.allow_data_change else ())
    broken = {name: values for name, values in changed.items() if not name.startswith(allowed)}
    if broken:
        diff = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in broken.items())
        data = "" if any(not name.startswith(DATA_FIELDS) for name in broken) else ", or train.allow_data_change=true"
        raise UserError(
            f"{run_dir}: holds a run of another config: {diff}; give another run_dir, or the same values{data}"
        )
    for name, (old, new) in changed.items():
        if not name.endswith("_dir"):
            say(f"resuming with {name} {old!r} -> {new!r}")


def _make_task(config: Config, source: Source, mesh: jax.sharding.Mesh) -> tuple[Task, BatchHook]:
    """The task of a run, and what is called before each batch of its evaluations."""
    hook = BatchHook()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return hook.wrap(jax.jit(traced_in(mesh, function), out_shardings=replicated(mesh)))

    return make_task(config, source, compute_options(config), compiled), hook


def tokens_per_step(config: Config, task: Task) -> int:
    """Tokens in a batch; on average, where batches differ."""
    return round(config.train.batch_size * task.tokens_per_row)


def with_steps(config: Config, task: Task) -> Config:
    """Turns `train.num_epochs` into `train.num_steps`: as many batches as hold these tokens, rounded up."""
    if not config.train.num_epochs:
        return config
    tokens = config.train.num_epochs * task.windows.tokens_per_epoch
    steps = max(1, math.ceil(tokens / tokens_per_step(config, task) - 1e-9))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=steps, num_epochs=0.0))


def _start(parts: Parts, base: LoadedRun | None, manifest: Manifest | None) -> tuple[TrainState, Loop]:
    """Draws the first state, or restores that of the checkpoint which `manifest` describes."""
    config = parts.config
    abstract = jax.eval_shape(lambda: init_state(config))
    where = shardings(parts.mesh, abstract)
    given = None if base is None else without_heads(base.params) | _kept_heads(config, base, manifest is None)
    given = None if given is None else put(given, shardings(parts.mesh, given))
    if manifest is None:
        loop = Loop(best_by=config.train.best_by, measured_on=parts.task.measured_on)
        return _run_once(lambda given: init_state(config, given), where)(given), loop
    frozen = _run_once(lambda given: init_state(config, given).frozen, where.frozen)(given)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, where)
    with cluster.all_or_none():
        loop = _check_meta(parts, manifest.meta)
    state = parts.checkpoints.restore(manifest.step, dataclasses.replace(abstract, frozen=frozen))
    with cluster.all_or_none():
        check_finite(state, f"{config.run_dir}, step {manifest.step}")
        in_a_row, limit = int(state.watch.in_a_row), config.train.max_skipped_in_a_row
        if in_a_row >= limit:
            raise UserError(
                f"train.max_skipped_in_a_row={limit}: the checkpoint of step {manifest.step} has had {in_a_row} already"
            )
    say(f"resuming from step {manifest.step}")
    return state, loop


def _kept_heads(config: Config, base: LoadedRun, report: bool) -> dict:
    """The base's heads for labels that this run has too, their outputs in this run's order; each head is reported.

    A head is looked for by its own name first, then among the others.
    """
    kept = {}
    for name, task in config.heads.items():
        for other in sorted(base.config.heads, key=lambda other: other != name):
            known = base.config.heads[other]
            same = all(getattr(known, field) == getattr(task, field) for field in ("kind", "multi_label", "delimiters"))
            outputs = output_count(known)
            if same and sorted(known.labels) == sorted(task.labels) and outputs == output_count(task):
                order = np.array([known.labels.index(label) for label in task.labels] or range(outputs))
                head = base.params["heads"][other]
                kept[name] = head | {leaf: head[leaf][order] for leaf in ("w", "bias")}
                break
        if report:
            source = f"kept from {config.init_from}" if name in kept else "new"
            what = f"{len(task.labels)} labels" if task.labels else f"{output_count(task)} outputs"
            say(f"head        {name}: {source}, {what}")
    return {"heads": kept} if kept else {}


def with_extension(config: Config, run_dir: Path, manifest: Manifest | None) -> Config:
    """Notes in `optim.extended` that a run resumes with another `train.num_steps` than it was planned for."""
    if manifest is None or not (run_dir / CONFIG_FILE).is_file():
        return config
    before, optim, num_steps = load_config(run_dir / CONFIG_FILE), config.optim, config.train.num_steps
    planned, update = before.train.num_steps, int(manifest.meta.get("updates", manifest.step))
    changes = before.optim.extended if optim.depends_on_length else ()
    optim = dataclasses.replace(optim, extended=changes)
    if planned != num_steps and optim.depends_on_length:
        rate, other = (float(make_schedule(optim, steps)(jnp.int32(update))) for steps in (planned, num_steps))
        if optim.extend == "stretch":
            optim = dataclasses.replace(optim, extended=())
            rate = float(make_schedule(optim, num_steps)(jnp.int32(update)))
        elif optim.extend == "restart" or not math.isclose(rate, other, rel_tol=1e-6):
            optim = dataclasses.replace(optim, extended=(*changes, f"{optim.extend} at {update} of {planned}"))
        others = " or ".join(how for how in EXTEND if how != optim.extend)
        say(
            f"train.num_steps {planned:,} -> {num_steps:,}: learning rate {rate:.3g} at step {manifest.step:,}"
            f" (optim.extend={optim.extend}; the other ways: {others})"
        )
    return dataclasses.replace(config, optim=optim)


def load_state(run_dir: Path) -> tuple[TrainState, dict]:
    """Loads a run's newest state whole, on one device, and its plain values.

    Raises:
        UserError: The folder is no run directory, or its newest checkpoint does not verify.
    """
    config = load_config(run_dir / CONFIG_FILE)
    manifest = choose(run_dir / FOLDER, "latest", strict=True).manifest
    if manifest is None:
        raise UserError(f"{run_dir}: has no checkpoint yet")
    checkpoints = Checkpoints(run_dir)
    try:
        abstract = on_one_device(jax.eval_shape(lambda: init_state(config)))
        if config.finetune.train != "all":
            frozen = frozen_params(run_dir, config, config.init_from, strict=True, notify=print)
            abstract = dataclasses.replace(abstract, frozen=frozen)
        return checkpoints.restore(manifest.step, abstract), manifest.meta
    finally:
        checkpoints.close()


def _run_once(function: Callable[..., Any], where: Any) -> Callable[..., Any]:
    """Jits a function whose result lies at `where` and which is called once.

    On a CPU it is compiled with little optimization: for drawing the state of configs/shakespeare_cpu.yaml that takes
    1.3 s of processor time instead of 4.0, and gives the same bits.
    """
    options: Any = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(function, out_shardings=where, compiler_options=options)


def _check_meta(parts: Parts, meta: dict) -> Loop:
    """Compares a checkpoint's plain values with the run as it is now; returns the loop's own state."""
    config = parts.config
    if "loop" not in meta:
        raise UserError(f"{config.run_dir}: holds parameters alone; train in another run_dir, with init_from naming it")
    if meta["tokenizer"] != parts.tokenizer.fingerprint:
        raise UserError(f"{config.run_dir}: the tokenizer is not the one that this run was trained with")
    if meta["data_hash"] != parts.task.data_hash:
        if not config.train.allow_data_change:
            raise UserError(
                f"{config.run_dir}: the data is not what this run was trained on; give another run_dir, or"
                " train.allow_data_change=true"
            )
        say("resuming with other data than before")
    loop = Loop(**meta["loop"])
    best_by, measured_on = config.train.best_by, parts.task.measured_on
    if loop.best_by != best_by or loop.measured_on not in ("", measured_on):
        reason = "was chosen by another score" if loop.best_by != best_by else "was measured on other validation data"
        say(f"the best evaluation so far {reason}; the next evaluation counts as the best")
        loop = Loop(evaluation_pending=loop.evaluation_pending)
    return dataclasses.replace(loop, best_by=best_by, measured_on=measured_on)


def checkpoint_meta(parts: Parts, state: TrainState, loop: Loop, scores: dict[str, float] | None) -> dict:
    """Plain values that a checkpoint holds besides the arrays, and that a run is checked against when it resumes.

    Args:
        parts: Of the run.
        state: That is saved.
        loop: At that step.
        scores: Of an evaluation at that step; None: there was none.
    """
    meta = {
        "loop": dataclasses.asdict(loop) | {"best_loss": min(loop.best_loss, 1e30)},  # JSON has no infinity
        "updates": int(state.step) - int(state.skipped),
        "data_hash": parts.task.data_hash,
        "tokenizer": parts.tokenizer.fingerprint,
    }
    if scores is not None:
        meta["evaluation"] = {"scores": plain(scores), "measured_on": parts.task.measured_on}
    return meta
