"""State of a run that is kept between its processes, and checks before it resumes."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from gptjax.checkpoints.checkpoint import FOLDER, Checkpoints
from gptjax.checkpoints.choice import choose
from gptjax.checkpoints.manifest import Manifest
from gptjax.checkpoints.run_dir import CONFIG_FILE, frozen_params, on_one_device
from gptjax.config.reader import differing_fields
from gptjax.config.run import Config
from gptjax.config.start import load_run_config
from gptjax.errors import UserError
from gptjax.report.metrics import plain
from gptjax.report.progress import say
from gptjax.training.parts import Parts
from gptjax.training.schedules import make_schedule
from gptjax.training.step import TrainState, init_state

# Fields that may change when a run resumes: they change neither the meaning of parameters nor the order of the data.
RESUMABLE = (
    *("run_dir", "cache_dir", "cluster.", "log.", "optim.", "mesh."),
    *("train.num_steps", "train.log_every", "train.eval_every", "train.eval_windows", "train.save_every"),
    *("train.keep_checkpoints", "train.patience", "train.sample_", "train.best_by"),
    *("train.remat", "train.unroll", "train.micro_batch_size", "train.spike_sigma", "train.max_skipped_in_a_row"),
    *("train.strict_checkpoints", "train.allow_data_change", "data.verify", "data.skip"),
    *("finetune.layer_decay", "finetune.head_learning_rate"),
)
DATA_FIELDS = ("data.", "sources", "mixture_temperature", "train.batch_size")
"""Fields that may also change with train.allow_data_change."""
EXTEND = ("continue", "restart", "stretch")
"""The values of `optim.extend`."""


@dataclasses.dataclass
class Loop:
    """State of the loop besides the train state; it is stored in the checkpoint."""

    best_loss: float = math.inf
    """Validation loss of the best evaluation."""
    evaluations_since_best: int = 0
    best_score: float | None = None
    """Score of the best evaluation, by `best_by`; None: there was none, or `best_by` is the loss."""
    best_by: str = "loss"
    """The value of `train.best_by` for these scores."""
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


def check_run_dir(config: Config, run_dir: Path) -> None:
    """Checks that a run does not resume with a config that changes its meaning."""
    if not (run_dir / CONFIG_FILE).exists():
        return
    changed = differing_fields(load_run_config(run_dir), config)
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


def with_extension(config: Config, run_dir: Path, manifest: Manifest | None) -> Config:
    """Notes in `optim.extended` that a run resumes with another `train.num_steps` than it was planned for."""
    if manifest is None or not (run_dir / CONFIG_FILE).is_file():
        return config
    before, optim, num_steps = load_run_config(run_dir), config.optim, config.train.num_steps
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
    config = load_run_config(run_dir)
    manifest = choose(run_dir / FOLDER, "latest", strict=True).manifest
    if manifest is None:
        raise UserError(f"{run_dir}: has no checkpoint yet")
    checkpoints = Checkpoints(run_dir)
    try:
        abstract = on_one_device(jax.eval_shape(lambda: init_state(config)))
        if config.finetune.train != "all" or config.finetune.mixout:
            frozen = frozen_params(run_dir, config, config.init_from, strict=True, notify=print)
            abstract = dataclasses.replace(abstract, frozen=frozen)
        return checkpoints.restore(manifest.step, abstract), manifest.meta
    finally:
        checkpoints.close()


def check_meta(parts: Parts, meta: dict) -> Loop:
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
