"""Runs a compiled prediction function on all rows of a set."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptjax.batches.labelled import Encoded, ordered_batches
from gptjax.batches.packed import EncodedWords, PackedSequences
from gptjax.evaluation.labels import Predictions
from gptjax.parallel.place import put

Predict = Callable[[dict, Any], tuple[jax.Array, jax.Array]]


def predict_rows(
    predict: Predict, params: dict, rows: Encoded, width: int, batch_size: int, sharding: jax.sharding.Sharding
) -> tuple[np.ndarray, float]:
    """Predicts all rows; returns float32 outputs `[rows, width]` in input order, and the mean loss of known targets."""
    outputs = np.zeros((len(rows.tokens), width), np.float32)
    sums = np.zeros(2)
    for numbers, batch in ordered_batches(rows, batch_size):
        found, loss = jax.device_get(predict(params, put(batch, sharding)))
        outputs[numbers[numbers >= 0]] = found[numbers >= 0]
        sums += loss
    return outputs, float(sums[0] / max(1.0, sums[1]))


def predict_words(
    predict: Predict,
    params: dict,
    words: EncodedWords,
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> tuple[Predictions, float]:
    """Predicts all words of sentences; returns probabilities in input order, and the mean loss of known tags. A tag
    that does not occur in training has probability 0 and no loss.
    """
    packed = PackedSequences(words.sequences, words.max_tokens, seed=0)
    found: list[Any] = [None] * len(words.sequences)
    targets: list[Any] = [None] * len(words.sequences)
    sums = np.zeros(2)
    for windows, batch in packed.ordered(batch_size):
        probabilities, loss = jax.device_get(predict(params, put(batch, sharding)))
        sums += loss
        for row, numbers in zip(probabilities, windows, strict=True):
            start = 0
            for number in numbers:
                positions, sequence = words.positions[number], words.sequences[number]
                found[number], targets[number] = row[start + positions], sequence.targets[positions]
                start += len(sequence.inputs)
    known_EN, labels = np.concatenate(found), words.labels
    probabilities_EN = np.pad(known_EN, ((0, 0), (0, len(labels) - known_EN.shape[1])))
    predictions = Predictions(probabilities_EN, np.concatenate(targets), labels, words.lengths, words.cut)
    return predictions, float(sums[0] / max(1.0, sums[1]))
