"""Predicts labels of texts and words with a model's heads.

Shape suffixes: N labels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batches.labelled import TextBatch, TextSet, ordered_batches
from gptjax.batches.packed import EncodedWords, PackedSequences
from gptjax.batches.pretraining import Batch
from gptjax.config.model import ModelConfig
from gptjax.config.task import TaskConfig
from gptjax.evaluation.labels import Predictions
from gptjax.model.gpt import Compute
from gptjax.model.loss import label_batch_loss, label_logits
from gptjax.parallel.place import put

Predict = Callable[[dict, Any], tuple[jax.Array, jax.Array]]


def make_predict(model: ModelConfig, task: TaskConfig, name: str, compute: Compute) -> Predict:
    """Returns `predict(params, batch) -> (probabilities, [nll, count])` of head `name`, to be jitted."""

    def predict(params: dict, batch: TextBatch | Batch) -> tuple[jax.Array, jax.Array]:
        logits = label_logits(model, task, compute, params, name, batch)
        loss = label_batch_loss(task, logits, batch)
        probabilities = jax.nn.sigmoid(logits) if task.multi_label else jax.nn.softmax(logits)
        return probabilities, jnp.stack([loss.nll, loss.count])

    return predict


def predict_texts(
    predict: Predict,
    params: dict,
    texts: TextSet,
    labels: tuple[str, ...],
    batch_size: int,
    sharding: jax.sharding.Sharding,
) -> tuple[Predictions, float]:
    """Predicts all texts; returns probabilities in input order, and the mean loss over texts with known labels."""
    probabilities_EN = np.zeros((len(texts.tokens), len(labels)), np.float32)
    sums = np.zeros(2)
    for numbers, batch in ordered_batches(texts, batch_size):
        found, loss = jax.device_get(predict(params, put(batch, sharding)))
        probabilities_EN[numbers[numbers >= 0]] = found[numbers >= 0]
        sums += loss
    predictions = Predictions(probabilities_EN, texts.targets, labels, cut=tuple(texts.cut.tolist()))
    return predictions, float(sums[0] / max(1.0, sums[1]))


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
