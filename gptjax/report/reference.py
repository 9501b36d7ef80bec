"""Reference curves: what presets reached with several seeds, and how far a run is from that.

`bench/reference_curves.py` makes the files in `curves/`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from gptjax.config.reader import to_flat
from gptjax.config.run import Config

IGNORED = (
    *("run_dir", "cache_dir", "seed", "log.", "mesh.", "cluster.", "data.path", "data.verify", "model.vocab_size"),
    *("train.log_every", "train.eval_every", "train.save_every", "train.keep_checkpoints", "train.patience"),
    *("train.sample_", "train.compute_dtype", "train.remat", "train.unroll", "train.micro_batch_size"),
    *("train.best_by", "train.strict_checkpoints", "train.allow_data_change"),
)
"""Options in which a run may differ from the reference: they hardly change the loss, or the data hash covers them."""
NEWEST = 20
"""Logged training losses that are compared together: seeds have different batches."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a preset reached: means over seeds."""

    preset: str
    options: dict[str, Any]
    """Those of the preset that matter and are not at their defaults, by dotted names."""
    data_hash: str
    seeds: list[int]
    steps: list[int]
    loss: list[float]
    """Training loss of the batches."""
    evaluated: list[int]
    """Steps of the evaluations."""
    val_loss: list[float]
    band: list[float]
    """Twice the standard deviation over seeds of the validation loss, pooled over neighbouring evaluations."""

    def validation(self, step: int, loss: float) -> tuple[float, float] | None:
        """How far a validation loss is above the reference, and the band there; None: before its first evaluation."""
        if not self.evaluated[0] <= step <= self.evaluated[-1]:
            return None
        mean, band = (float(np.interp(step, self.evaluated, values)) for values in (self.val_loss, self.band))
        return loss - mean, band

    def training(self, rows: Sequence[tuple[int, float]]) -> float | None:
        """How far the mean of the newest logged losses is above the reference; None: they are too few.

        Args:
            rows: Steps and losses, the newest last.
        """
        newest = [row for row in rows[-NEWEST:] if row[0] <= self.steps[-1]]
        if len(newest) < NEWEST // 2:
            return None
        expected = np.interp([step for step, _ in newest], self.steps, self.loss)
        return float(np.mean([loss for _, loss in newest]) - np.mean(expected))


@cache
def references() -> dict[str, Reference]:
    """All references that come with gptjax, by the name of the preset."""
    files = sorted((resources.files("gptjax.report") / "curves").iterdir(), key=lambda file: file.name)
    found = [Reference(**json.loads(file.read_text(encoding="utf-8"))) for file in files if file.name.endswith(".json")]
    return {one.preset: one for one in found}


def find_reference(config: Config, data_hash: str) -> Reference | None:
    """The reference of a run with the options of a preset, on the same data."""
    own = options_that_matter(config)
    return next((one for one in references().values() if (one.options, one.data_hash) == (own, data_hash)), None)


def options_that_matter(config: Config) -> dict[str, Any]:
    """Options that are not at their defaults, without those of `IGNORED`."""
    defaults, flat = to_flat(Config()), to_flat(config)
    changed = {name: value for name, value in flat.items() if value != defaults.get(name)}
    return {name: value for name, value in changed.items() if not name.startswith(IGNORED)}


def make_reference(preset: str, config: Config, data_hash: str, runs: Mapping[int, Sequence[dict]]) -> Reference:
    """Averages the runs of several seeds.

    Args:
        preset: Name of the preset.
        config: Of one of the runs.
        data_hash: Of their data.
        runs: Rows of metrics.jsonl by seed; the same steps in all of them.
    """
    losses = [{row["step"]: row["loss"] for row in rows if "tokens_per_s" in row} for rows in runs.values()]
    evaluations = [{row["step"]: row["val_loss"] for row in rows if "val_loss" in row} for rows in runs.values()]
    steps, evaluated = sorted(losses[0]), sorted(evaluations[0])
    mean = np.mean([[of[step] for step in steps] for of in losses], axis=0)
    values = np.array([[of[step] for step in evaluated] for of in evaluations])
    variance = values.var(axis=0, ddof=1)
    pooled = [variance[max(0, n - 1) : n + 2].mean() for n in range(len(evaluated))]
    return Reference(
        preset=preset,
        options=options_that_matter(config),
        data_hash=data_hash,
        seeds=sorted(runs),
        steps=steps,
        loss=np.round(mean, 4).tolist(),
        evaluated=evaluated,
        val_loss=np.round(values.mean(axis=0), 4).tolist(),
        band=np.round(2 * np.sqrt(pooled), 4).tolist(),
    )
