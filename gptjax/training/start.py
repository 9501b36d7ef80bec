"""The first train state of a run, or that of its newest checkpoint."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptjax.checkpoints.manifest import Manifest
from gptjax.checkpoints.run_dir import LoadedRun, check_finite
from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.parallel import cluster
from gptjax.parallel.place import put
from gptjax.parallel.rules import shardings
from gptjax.report.progress import say
from gptjax.tasks.heads import output_count
from gptjax.tasks.trainable import without_heads
from gptjax.training.parts import Parts
from gptjax.training.resume import Loop, check_meta
from gptjax.training.step import TrainState, init_state


def first_state(parts: Parts, base: LoadedRun | None, manifest: Manifest | None) -> tuple[TrainState, Loop]:
    """Draws the first state, or restores that of the checkpoint which `manifest` describes."""
    config = parts.config
    abstract = jax.eval_shape(lambda: init_state(config))
    where = shardings(parts.mesh, abstract)
    given = None if base is None else without_heads(base.params) | _kept_heads(config, base, manifest is None)
    if constants := parts.task.constants:
        kept = (given or {}).get("heads", {})
        given = (given or {}) | {"heads": kept | {n: leaves | kept.get(n, {}) for n, leaves in constants.items()}}
    given = None if given is None else put(given, shardings(parts.mesh, given))
    if manifest is None:
        loop = Loop(best_by=config.train.best_by, measured_on=parts.task.measured_on)
        return _run_once(lambda given: init_state(config, given), where)(given), loop
    frozen = _run_once(lambda given: init_state(config, given).frozen, where.frozen)(given)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, where)
    with cluster.all_or_none():
        loop = check_meta(parts, manifest.meta)
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
            same = all(
                getattr(known, field) == getattr(task, field)
                for field in ("kind", "multi_label", "delimiters", "bag_of_words", "layer_mixture")
            )
            outputs = output_count(known)
            if same and sorted(known.labels) == sorted(task.labels) and outputs == output_count(task):
                order = np.array([known.labels.index(label) for label in task.labels] or range(outputs))
                head = base.params["heads"][other]
                kept[name] = head | {leaf: head[leaf][order] for leaf in ("w", "bias")}
                if task.bag_of_words:
                    kept[name]["words"] = head["words"][:, order]
                break
        if report:
            source = f"kept from {config.init_from}" if name in kept else "new"
            what = f"{len(task.labels)} labels" if task.labels else f"{output_count(task)} outputs"
            say(f"head        {name}: {source}, {what}")
    return {"heads": kept} if kept else {}


def _run_once(function: Callable[..., Any], where: Any) -> Callable[..., Any]:
    """Jits a function whose result lies at `where` and which is called once.

    On a CPU it is compiled with little optimization: for drawing the state of configs/shakespeare_cpu.yaml that takes
    1.3 s of processor time instead of 4.0, and gives the same bits.
    """
    options: Any = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(function, out_shardings=where, compiler_options=options)
