"""Builds the parts of a run from its config, and checks that they fit together, before anything expensive starts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax import __version__
from gptjax.checkpoints.checkpoint import Checkpoints
from gptjax.checkpoints.run_dir import LoadedRun, load_run, write_description
from gptjax.config.cluster import ClusterConfig
from gptjax.config.reader import to_flat
from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.machine.native.build import start_compiling
from gptjax.parallel import cluster
from gptjax.parallel.fits import check_fits
from gptjax.parallel.mesh import make_mesh, replicated, traced_in
from gptjax.parallel.rules import shardings
from gptjax.report.progress import say
from gptjax.report.sinks import check_installed
from gptjax.tasks.registry import make_task, read_source
from gptjax.tasks.task import Source, Task
from gptjax.training.in_flight import BatchHook
from gptjax.training.parts import Parts, describe_data
from gptjax.training.resolve import resolve, with_compute_dtype, with_steps
from gptjax.training.resume import Loop, check_run_dir, with_extension
from gptjax.training.start import first_state
from gptjax.training.step import TrainState, compute_options, init_state, jit_train_step

OWN_FIELDS = ("cluster.", "cache_dir")
"""Fields that may differ between the processes of a run."""


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
        start_compiling(mesh.size)
        config = with_compute_dtype(config, run_dir)
        if not config.init_from:  # else the base has the shape
            check_fits(config, mesh)
        base = _base_run(config)
        source = read_source(config, base.tokenizer if base else None)
        source = dataclasses.replace(source, base=base.params if base else None)
        config = resolve(config, source, base)
        check_fits(config, mesh)
        task, hook = _make_task(config, source, mesh)
        config = with_steps(config, task)
    checkpoints = Checkpoints(run_dir, config.train.keep_checkpoints, say, config.train.best_by)
    choice = checkpoints.newest(config.train.strict_checkpoints)
    with cluster.all_or_none():
        config = with_extension(config, run_dir, choice.manifest)
        check_run_dir(config, run_dir)
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
            data=describe_data(source),
        )
    facts = {"the data": parts.task.data_hash, "the tokenizer": source.tokenizer.fingerprint}
    cluster.require_same(facts | {"train.compute_dtype": config.train.compute_dtype}, "give all of them the same files")
    state, loop = first_state(parts, base, choice.manifest)
    with cluster.all_or_none():
        try:
            if cluster.is_first() and not why_finished(parts, int(state.step), loop):
                checkpoints.set_aside_damaged(choice)
                write_description(run_dir, config, source.tokenizer, base)
        except OSError as error:
            raise UserError(f"run_dir={run_dir} cannot be written to: {error.strerror}") from None
    return parts, state, loop


def why_finished(parts: Parts, step: int, loop: Loop) -> str:
    """The reason why a run has no steps to train; empty if it has some."""
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


def _make_task(config: Config, source: Source, mesh: jax.sharding.Mesh) -> tuple[Task, BatchHook]:
    """The task of a run, and what is called before each batch of its evaluations."""
    hook = BatchHook()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return hook.wrap(jax.jit(traced_in(mesh, function), out_shardings=replicated(mesh)))

    return make_task(config, source, compute_options(config), compiled), hook
