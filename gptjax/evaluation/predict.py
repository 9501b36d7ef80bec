"""What a compiled function predicts for all rows of a set, in their order."""

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
    """Predicts all rows; returns float32 outputs `[rows, width]` in their order, and the mean loss where targets are
    known.
    """
    outputs = np.zeros((len(rows.tokens), width), np.float32)
    sums = np.zeros(2)
    for numbers, batch in ordered_batches(rows, batch_size):
        found, loss = jax.device_get(predict(params, put(batch, sharding)))
        outputs[numbers[numbers >= 0]] = found[numbers >= 0]
        sums += loss
    return outputs, float(sums[0] / max(1.0, sums[1]))


def predict_texts(
    predict: Predict,
    params: dict,
    texts: Encoded,
    labels: tuple[str, ...],
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> tuple[Predictions, float]:
    """Predicts all texts; returns probabilities in input order, and the mean loss over texts with known labels."""
    probabilities_EN, loss = predict_rows(predict, params, texts, len(labels), batch_size, sharding)
    return Predictions(probabilities_EN, texts.targets, labels, cut=tuple(texts.cut.tolist())), loss


def predict_words(
    predict: Predict,
    params: dict,
    words: EncodedWords,
    labels: tuple[str, ...],
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> tuple[Predictions, float]:
    """Predicts all words of sentences; returns probabilities in input order, and the mean loss over known tags."""
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
    predictions = Predictions(np.concatenate(found), np.concatenate(targets), labels, words.lengths, words.cut)
    return predictions, float(sums[0] / max(1.0, sums[1]))
