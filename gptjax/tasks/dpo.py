"""Direct preference optimization (DPO, arXiv:2305.18290): trains on pairs of responses without a reward model.

The reference model is the model before training. Its log-probabilities of all responses are computed once, before the
first step, so that training needs no second copy of the weights.

Shape suffixes: B pairs, R = 2 B sequences, T position, D n_embd.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batches.labelled import TextBatches, ordered_batches
from gptjax.batches.preferences import PreferenceBatch, PreferenceSet, encode_preferences
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.task import AdapterConfig
from gptjax.evaluation.predict import Predict, predict_rows
from gptjax.evaluation.preferences import PreferenceScores, ScorePredictions, score_preferences
from gptjax.model.gpt import Compute, states_and_extras
from gptjax.model.loss import inputs_of
from gptjax.ops.cross_entropy import Loss
from gptjax.tasks.heads import flat
from gptjax.tasks.log_probs import token_log_probs
from gptjax.tasks.task import Compile, Kind, Source, StatesLoss, Task, hash_arrays, longest
from gptjax.text.labelled import Preference
from gptjax.text.preferences import parse_preference, plain_text
from gptjax.text.tokenizers.base import Tokenizer


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    examples = source.examples[name]
    assert source.base is not None  # the task requires init_from
    train, validation = (
        with_reference(config, source.base, encode_preferences(side, source.tokenizer, longest(config)), compute)
        for side in (examples.train, examples.validation)
    )
    windows = TextBatches(train, config.task, config.seed)
    predict = compiled(make_predict(config, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> PreferenceScores:
        return score_preferences(*_predicted(predict, params, validation, config.train.micro_batch, sharding))

    cut = int(train.cut.sum() + validation.cut.sum())
    note = (
        f"{len(train.tokens):,} pairs of responses, {len(validation.tokens):,} to validate on, {cut:,} cut at"
        f" {longest(config)} tokens"
    )
    return Task(
        windows,
        windows.mean_tokens,
        _hash(train),
        evaluate,
        (note, *examples.notes),
        evaluation_batches=-(-len(validation.tokens) // config.train.micro_batch),
        measured_on=_hash(validation),
    )


def dpo_states_loss(config: Config, _name: str) -> StatesLoss:
    """The loss of equation 7. Its metrics are the accuracy and the margin of the implicit rewards."""

    def states_loss(params: dict, x_RTD: jax.Array, batch: PreferenceBatch) -> Loss:
        log_p_B2 = response_log_probs(config.model, params, x_RTD, batch)
        return preference_loss(config.task.beta, log_p_B2, batch.reference, batch.weights)

    return states_loss


def preference_loss(beta: float, log_p_B2: jax.Array, reference_B2: jax.Array, weights_B: jax.Array) -> Loss:
    """Sums the loss of pairs, given the log-probabilities of their responses, the chosen one first."""
    rewards_B2 = beta * (log_p_B2 - reference_B2)
    margins_B = rewards_B2[:, 0] - rewards_B2[:, 1]
    total = jnp.sum(jax.nn.softplus(-margins_B) * weights_B)
    right = jnp.sum(jnp.where(margins_B > 0, weights_B, 0.0))
    extras = {"accuracy": right, "margin": jnp.sum(margins_B * weights_B)}
    return Loss(total, total, jnp.sum(weights_B), extras)


def response_log_probs(model: ModelConfig, params: dict, x_RTD: jax.Array, batch: PreferenceBatch) -> jax.Array:
    """The log-probability of each response, float32 `[B, 2]`."""
    targets_RT = batch.targets.reshape(-1, batch.targets.shape[-1])
    return jnp.sum(token_log_probs(model, params, x_RTD, targets_RT), axis=-1).reshape(batch.reference.shape)


def make_predict(config: Config, compute: Compute) -> Predict:
    """Returns `predict(params, batch) -> (implicit rewards [B, 2], [nll, count])`, to be jitted."""

    def predict(params: dict, batch: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
        log_p_B2 = _log_probs(config.model, compute)(params, batch)
        loss = preference_loss(config.task.beta, log_p_B2, batch.reference, batch.weights)
        return config.task.beta * (log_p_B2 - batch.reference), jnp.stack([loss.nll, loss.count])

    return predict


def with_reference(config: Config, base: dict, pairs: PreferenceSet, compute: Compute) -> PreferenceSet:
    """Computes the log-probabilities under the reference model, on this process's first device."""
    model = dataclasses.replace(config.model, adapter=AdapterConfig(), dropout=0.0)
    log_probs = jax.jit(_log_probs(model, compute))
    base = jax.device_put(base, jax.local_devices()[0])
    reference = np.zeros((len(pairs.tokens), 2), np.float32)
    for numbers, batch in ordered_batches(pairs, config.train.micro_batch):
        reference[numbers[numbers >= 0]] = np.asarray(log_probs(base, batch))[numbers >= 0]
    return dataclasses.replace(pairs, targets=reference)


def measure_preferences(
    config: Config, params: dict, base: dict, tokenizer: Tokenizer, examples: list[Preference]
) -> PreferenceScores:
    """Measures a trained model on pairs; `base` are the parameters of the reference model."""
    compute = Compute(unroll=1)
    pairs = with_reference(config, base, encode_preferences(examples, tokenizer, longest(config)), compute)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    predict = jax.jit(make_predict(config, compute))
    return score_preferences(*_predicted(predict, params, pairs, config.train.micro_batch, sharding))


def _log_probs(model: ModelConfig, compute: Compute) -> Callable[[dict, Any], jax.Array]:
    def log_probs(params: dict, batch: PreferenceBatch) -> jax.Array:
        rows = flat(batch)
        x_RTD, _ = states_and_extras(model, params, rows.inputs, inputs_of(model, rows), compute=compute)
        return response_log_probs(model, params, x_RTD, batch)

    return log_probs


def _predicted(
    predict: Predict, params: dict, pairs: PreferenceSet, batch_size: int, sharding: jax.sharding.Sharding
) -> tuple[ScorePredictions, float]:
    rewards, loss = predict_rows(predict, params, pairs, 2, batch_size, sharding)
    return ScorePredictions(rewards, tuple(pairs.cut.tolist())), loss


def _hash(pairs: PreferenceSet) -> str:
    """Hash of the tokens. The reference log-probabilities are not included: they depend on the tokens and the base."""
    return hash_arrays(
        array for pair in pairs.tokens for sequence in pair for array in (sequence.inputs, sequence.targets)
    )


KIND = Kind(build, dpo_states_loss, parse_preference, plain_text)
