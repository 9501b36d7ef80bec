"""Builds the parts of a run from its config, and checks that they fit together, before anything expensive starts."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax import __version__
from gptjax.checkpoints.checkpoint import FOLDER, Checkpoints
from gptjax.checkpoints.choice import choose
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
from gptjax.config.run import Config, TrainConfig
from gptjax.errors import UserError
from gptjax.machine.native.build import begin as begin_kernels
from gptjax.parallel import cluster
from gptjax.parallel.fits import check_fits
from gptjax.parallel.mesh import make_mesh, replicated, traced_in
from gptjax.parallel.place import put
from gptjax.parallel.rules import shardings
from gptjax.report.progress import say
from gptjax.tasks.multi import parts_of
from gptjax.tasks.registry import make_task, read_source, with_labels
from gptjax.tasks.task import Source, Task
from gptjax.tasks.trainable import without_heads
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.precision import compute_dtype
from gptjax.training.step import TrainState, compute_options, init_state, jit_train_step

# Fields that may change when a run goes on: they change neither what a parameter means nor which tokens come next.
RESUMABLE = (
    *("run_dir", "cache_dir", "cluster.", "optim.", "mesh.", "train.num_steps", "train.log_every", "train.eval_every"),
    *("train.eval_windows", "train.save_every", "train.keep_checkpoints", "train.patience", "train.sample_"),
    *("train.remat", "train.unroll", "train.micro_batch_size", "train.spike_sigma", "train.max_skipped_in_a_row"),
    *("train.strict_checkpoints", "train.allow_data_change", "data.verify"),
    *("finetune.layer_decay", "finetune.head_learning_rate"),
)
OWN_FIELDS = ("cluster.", "cache_dir")  # may differ between the processes of a run
DATA_FIELDS = ("data.", "train.batch_size")  # may change too where train.allow_data_change says so


@dataclasses.dataclass
class Loop:
    """What the loop remembers beside the train state; it travels in the checkpoint."""

    best_loss: float = math.inf
    evaluations_since_best: int = 0


@dataclasses.dataclass(frozen=True)
class Parts:
    """All that a run is made of."""

    config: Config
    run_dir: Path
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    task: Task
    train_step: Any
    """Jitted; the state is donated."""
    checkpoints: Checkpoints

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a batch; on average, where batches differ."""
        return round(self.config.train.batch_size * self.task.tokens_per_row)


def build(config: Config, run_dir: Path) -> tuple[Parts, TrainState, Loop]:
    """Prepares data, tokenizer, mesh, compiled functions and the state to start or go on from.

    Raises:
        UserError: Something in the config, the data or the run directory does not fit.
    """
    _check_same_program(config)
    config = dataclasses.replace(config, cluster=ClusterConfig())  # the run may go on in another one
    with cluster.together():
        mesh = make_mesh(config.mesh)
        begin_kernels(mesh.size)
        config = with_compute_dtype(config, run_dir)
        if not config.init_from:  # else the base has the shape
            check_fits(config, mesh)
        base = _base_run(config)
        source = read_source(config, base.tokenizer if base else None)
        config = _resolve(config, source, base)
        check_fits(config, mesh)
        _check_run_dir(config, run_dir)
        parts = _assemble(config, run_dir, source, mesh)
    facts = {"the data": parts.task.data_hash, "the tokenizer": source.tokenizer.fingerprint}
    cluster.require_same(facts | {"train.compute_dtype": config.train.compute_dtype}, "give all of them the same files")
    state, loop = _start(parts, base)
    with cluster.together():
        try:
            if cluster.is_first():
                write_description(run_dir, config, source.tokenizer, base)
        except OSError as error:
            raise UserError(f"run_dir={run_dir} cannot be written to: {error.strerror}") from None
    return parts, state, loop


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
    """Settles what "auto" means: a run goes on as it began, on whatever machine."""
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
        config = dataclasses.replace(config, model=_base_shape(config, base), tokenizer=base.config.tokenizer)
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
    if config.finetune.train == "top" and config.finetune.top_k > config.model.n_layer:
        raise UserError(f"finetune.top_k={config.finetune.top_k} must be at most model.n_layer={config.model.n_layer}")
    config = with_labels(config, source.examples)
    if config.train.sample_tokens and not config.heads:
        train = dataclasses.replace(config.train, sample_prompt=_sample_prompt(config, source.tokenizer))
        config = dataclasses.replace(config, train=train)
    return config


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
    """Refuses to go on with a run under a config that means something else."""
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
            say(f"going on with {name} {old!r} -> {new!r}")


def _assemble(config: Config, run_dir: Path, source: Source, mesh: jax.sharding.Mesh) -> Parts:
    state_shardings = shardings(mesh, jax.eval_shape(lambda: init_state(config)))
    return Parts(
        config=config,
        run_dir=run_dir,
        mesh=mesh,
        tokenizer=source.tokenizer,
        task=make_task(
            config,
            source,
            compute_options(config),
            lambda function: jax.jit(traced_in(mesh, function), out_shardings=replicated(mesh)),
        ),
        train_step=jit_train_step(config, mesh, state_shardings),
        checkpoints=Checkpoints(run_dir, config.train.keep_checkpoints, say),
    )


def _start(parts: Parts, base: LoadedRun | None) -> tuple[TrainState, Loop]:
    """Draws the first state, or restores the newest that verifies."""
    config = parts.config
    abstract = jax.eval_shape(lambda: init_state(config))
    where = shardings(parts.mesh, abstract)
    given = None if base is None else without_heads(base.params)
    given = None if given is None else put(given, shardings(parts.mesh, given))
    manifest = parts.checkpoints.resume(config.train.strict_checkpoints).manifest
    if manifest is None:
        return _run_once(lambda given: init_state(config, given), where)(given), Loop()
    frozen = _run_once(lambda given: init_state(config, given).frozen, where.frozen)(given)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, where)
    with cluster.together():
        loop = _check_meta(parts, manifest.meta)
    state = parts.checkpoints.restore(manifest.step, dataclasses.replace(abstract, frozen=frozen))
    with cluster.together():
        check_finite(state, f"{config.run_dir}, step {manifest.step}")
        in_a_row, limit = int(state.watch.in_a_row), config.train.max_skipped_in_a_row
        if in_a_row >= limit:
            raise UserError(
                f"train.max_skipped_in_a_row={limit}: the checkpoint of step {manifest.step} has had {in_a_row} already"
            )
    say(f"going on from step {manifest.step}")
    return state, loop


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
    """Holds what a checkpoint was trained on against what is there now; returns the loop's own state."""
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
        say("going on with other data than before")
    return Loop(**meta["loop"])


def checkpoint_meta(parts: Parts, loop: Loop) -> dict:
    """Plain values that a checkpoint holds beside the state, and that a run that goes on is checked against."""
    return {
        "loop": dataclasses.asdict(loop) | {"best_loss": min(loop.best_loss, 1e30)},  # JSON has no infinity
        "data_hash": parts.task.data_hash,
        "tokenizer": parts.tokenizer.fingerprint,
    }
