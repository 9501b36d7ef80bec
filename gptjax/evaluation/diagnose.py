"""Breaks a loss down by position, token frequency and confidence; measures repetition in generated text.

Shape suffixes: N targets, B batch, T position, V vocabulary.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batches.pretraining import Batch
from gptjax.config.model import ModelConfig
from gptjax.model import gpt
from gptjax.model.gpt import Compute
from gptjax.parallel.place import put

FREQUENCY_BOUNDS = (0, 1, 10, 100, 1000, 10_000, 100_000)
"""Boundaries of the groups of token counts in the training text."""
CALIBRATION_BINS = 10
SETTLED = 0.01
"""The used context ends at the position after which the loss falls by less than this, in nats."""


class Predictions(NamedTuple):
    """Predictions of all targets, in any order: arrays [N]."""

    targets: np.ndarray
    positions: np.ndarray
    """Position of the target's input in its document and window, from 0."""
    nll: np.ndarray
    """Nats."""
    top_probability: np.ndarray
    """Probability of the most likely token."""
    correct: np.ndarray
    """Whether the most likely token is the target."""


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of targets."""

    name: str
    count: int
    loss: float
    """Mean loss, in nats."""
    accuracy: float
    confidence: float
    """Mean probability of the most likely token."""


def predict_targets(
    config: ModelConfig, params: dict, batches: Iterable[Batch], compute: Compute, sharding: jax.sharding.Sharding
) -> Predictions:
    """Runs the model over batches."""

    @jax.jit
    def run(params, batch):
        states_BTD = gpt.hidden_states(config, params, batch.inputs, batch.positions, batch.segments, compute=compute)
        log_BTV = jax.nn.log_softmax(gpt.logits(config, params, states_BTD), axis=-1)
        nll_BT = -jnp.take_along_axis(log_BTV, jnp.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
        return nll_BT, jnp.exp(log_BTV.max(axis=-1)), log_BTV.argmax(axis=-1) == batch.targets

    parts = []
    for batch in batches:
        nll, top, correct = jax.device_get(run(params, put(batch, sharding)))
        counted = np.asarray(batch.targets) >= 0
        arrays = (np.asarray(batch.targets), np.asarray(batch.positions), nll, top, correct)
        parts.append([array[counted] for array in arrays])
    return Predictions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def by_position(predictions: Predictions) -> list[Group]:
    """Groups by position, in ranges that double: 0, 1, 2-3, 4-7, …"""
    exponents = np.ceil(np.log2(predictions.positions + 1)).astype(int)
    names = ["0", "1", *(f"{2 ** (n - 1)}-{2**n - 1}" for n in range(2, exponents.max() + 1))]
    return _groups(predictions, exponents, names)


def used_context(groups: Sequence[Group]) -> str:
    """The range of positions after which the loss stops falling."""
    for number, group in enumerate(groups):
        if all(group.loss - later.loss < SETTLED for later in groups[number + 1 :]):
            return group.name
    return groups[-1].name


def by_frequency(predictions: Predictions, counts_V: np.ndarray) -> list[Group]:
    """Groups by the count of the target in the training text."""
    numbers = np.searchsorted(FREQUENCY_BOUNDS, counts_V[predictions.targets], side="right") - 1
    bounds = [f"{bound:,}" for bound in FREQUENCY_BOUNDS]
    names = ["never", *(f"{low} or more, below {high}" for low, high in itertools.pairwise(bounds[1:]))]
    return _groups(predictions, numbers, [*names, f"{bounds[-1]} or more"])


def by_confidence(predictions: Predictions) -> list[Group]:
    """Groups by the probability of the most likely token. For a calibrated model it equals the accuracy."""
    numbers = np.minimum((predictions.top_probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    width = 1 / CALIBRATION_BINS
    return _groups(predictions, numbers, [f"{n * width:.1f}-{(n + 1) * width:.1f}" for n in range(CALIBRATION_BINS)])


def calibration_error(groups: Sequence[Group]) -> float:
    """Expected calibration error (arXiv:1706.04599, equation 3): the mean distance of accuracy and confidence."""
    total = sum(group.count for group in groups)
    return sum(group.count * abs(group.accuracy - group.confidence) for group in groups) / total


def repetition(texts: Iterable[Sequence[int]], length: int) -> float:
    """Share of token n-grams that occur earlier in the same text; NaN if no text is long enough."""
    repeated = total = 0
    for text in texts:
        grams = [tuple(text[n : n + length]) for n in range(len(text) - length + 1)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else math.nan


def _groups(predictions: Predictions, numbers: np.ndarray, names: Sequence[str]) -> list[Group]:
    found = []
    for number, name in enumerate(names):
        inside = numbers == number
        if count := int(inside.sum()):
            means = (predictions.nll, predictions.correct, predictions.top_probability)
            found.append(Group(name, count, *(float(values[inside].mean(dtype=np.float64)) for values in means)))
    return found
