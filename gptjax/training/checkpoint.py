"""Run directories and their checkpoints: the only file that knows Orbax.

A checkpoint has the items `params`, `ema` (where the run averages), `rest` (the other fields of the train state) and
`meta` (plain values: the loop's own state, the data's hash, versions). Sampling and `init_from` read one of the first
two. Beside the checkpoints lie `config.yaml` and `tokenizer.json`.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from gptjax.config import Config
from gptjax.config_io import load_config, to_yaml
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.model.gpt import init_params
from gptjax.text.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from gptjax.training.step import TrainState

CONFIG_FILE, TOKENIZER_FILE, FOLDER = "config.yaml", "tokenizer.json", "checkpoints"


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model, ready to be used."""

    config: Config
    params: dict
    tokenizer: Tokenizer | None
    step: int


class Checkpoints:
    """The checkpoints of one run, written asynchronously; keeps the newest few and the best."""

    def __init__(self, run_dir: Path, keep: int = 1):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of each checkpoint without an evaluation
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=_val_loss,
            reverse=True,  # the lowest loss counts as best
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            (run_dir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                best_fn=_val_loss,
                best_mode="min",
                step_format_fixed_length=8,
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest step that was saved whole, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the lowest validation loss, or the newest where none was evaluated."""
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        losses = {step: _val_loss(values) for step, values in metrics.items() if values}
        return min(losses, key=lambda step: losses[step], default=self.latest_step())

    def save(self, state: TrainState, meta: dict, val_loss: float | None) -> None:
        """Starts writing `state`; returns when the arrays are copied. A step that is saved already is left alone."""
        items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        self.save_items(int(state.step), items | {"meta": ocp.args.JsonSave(meta)}, val_loss)

    def save_items(self, step: int, items: dict[str, Any], val_loss: float | None) -> None:
        """Starts writing named items as checkpoint `step`."""
        if step not in self._manager.all_steps():
            metrics = None if val_loss is None else {"val_loss": val_loss}
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """Loads a step into the shapes, dtypes and shardings of `abstract`; returns the state and its meta values."""
        items = {name: ocp.args.StandardRestore(item) for name, item in _items(abstract).items()}
        loaded = self._manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
        state = TrainState(params=loaded["params"], ema=loaded.get("ema"), **loaded["rest"])
        return state, loaded["meta"]

    def restore_item(self, step: int, name: str, abstract: Any) -> Any:
        """Loads one item of arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.StandardRestore(abstract)}))[name]

    def wait(self) -> None:
        """Returns when all that was started is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes all writing."""
        self._manager.close()


def write_description(run_dir: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Writes `config.yaml` and `tokenizer.json`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / CONFIG_FILE, to_yaml(config).encode())
    if tokenizer is not None:
        save_tokenizer(tokenizer, run_dir / TOKENIZER_FILE)


def load_run(run_dir: Path, which: Literal["best", "latest"] = "best") -> LoadedRun:
    """Loads a run's parameters (averaged, where the run averages) on one device, its config and its tokenizer.

    Raises:
        UserError: The folder is no run directory or has no checkpoint.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"{run_dir}: no run directory (it has no {CONFIG_FILE}); train one with gptjax train")
    config = load_config(run_dir / CONFIG_FILE)
    if not (run_dir / FOLDER).is_dir():
        raise UserError(f"{run_dir}: has no checkpoint yet")
    checkpoints = Checkpoints(run_dir)
    try:
        step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
        if step is None:
            raise UserError(f"{run_dir}: has no checkpoint yet")
        item = "ema" if config.train.ema else "params"
        params = checkpoints.restore_item(step, item, _abstract_params(config))
    finally:
        checkpoints.close()
    tokenizer_path = run_dir / TOKENIZER_FILE
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path.is_file() else None
    return LoadedRun(config, params, tokenizer, step)


def write_run(run_dir: Path, config: Config, params: dict, tokenizer: Tokenizer | None) -> None:
    """Makes a run directory of parameters alone, as checkpoint 0: something to sample from and to start from.

    Raises:
        UserError: The folder holds a run already.
    """
    if (run_dir / CONFIG_FILE).exists() or (run_dir / FOLDER).exists():
        raise UserError(f"{run_dir}: holds a run already; name another folder")
    write_description(run_dir, config, tokenizer)
    checkpoints = Checkpoints(run_dir)
    try:
        checkpoints.save_items(0, {"params": ocp.args.StandardSave(params)}, None)
    finally:
        checkpoints.close()


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state (or their shapes), by item."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    items: dict[str, Any] = {"params": fields.pop("params"), "ema": fields.pop("ema"), "rest": fields}
    return {name: item for name, item in items.items() if item is not None}


def _abstract_params(config: Config) -> dict:
    """Shapes and dtypes of a run's parameters, placed on one device."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, config.train.param_dtype, sharding=where), shapes)


def _val_loss(metrics: dict) -> float:
    return metrics["val_loss"]
