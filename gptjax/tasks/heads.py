"""Heads of tasks: parameters, inputs, outputs, loss.

A head is `heads/NAME/w [N, D]` and `bias [N]`. With `task.delimiters: learned` it also has `tokens [3, D]`: the
embeddings of a start, a delimiter and an extract token. Their ids follow those of the model's embedding table.

Shape suffixes: B examples, K sequences of an example, R = B K sequences, T position, D n_embd, N outputs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.batches.labelled import CandidateBatch, Marks, TextBatch
from gptjax.batches.preferences import PreferenceBatch
from gptjax.batches.pretraining import Batch
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.model.bag import init_bag
from gptjax.model.gpt import Compute, states_and_extras
from gptjax.model.heads import head_logits, init_head, label_loss, pool
from gptjax.model.loss import all_inputs, label_batch_loss, loss_options, state_logits, text_logits, token_loss
from gptjax.model.parameters import INIT_STD, normal
from gptjax.ops.cross_entropy import Loss, with_extras
from gptjax.tasks.functions import call_function

NO_CANDIDATE = -1e30  # finite, because -inf minus -inf is NaN
SCORED = ("choose", "reward")
"""Tasks whose head computes one score per sequence."""


def output_count(task: TaskConfig) -> int:
    """Number of outputs of the head."""
    if task.kind == "regress":
        return len(task.means)
    if task.kind == "answer":
        return 2
    return 1 if task.kind in SCORED else len(task.labels)


def init_task_head(model: ModelConfig, task: TaskConfig, key: jax.Array) -> dict:
    """Initializes the float32 parameters of a task's head."""
    head = init_head(model.n_embd, output_count(task), key)
    if task.layer_mixture:
        head |= {"mix": jnp.zeros(model.n_layer + 1), "scale": jnp.ones(())}
    if task.bag_of_words:
        head |= init_bag(output_count(task))
    if task.delimiters == "learned":
        head["tokens"] = normal(INIT_STD)(jax.random.fold_in(key, 1), (3, model.n_embd))
    return head


def learned_marks(model: ModelConfig) -> Marks:
    """The ids of the learned tokens, which follow the rows of the model's embedding table."""
    first = model.padded_vocab_size
    return Marks((first,), (first + 1,), (first + 2,))


def with_learned_tokens(params: dict, name: str, task: TaskConfig) -> dict:
    """Appends the learned tokens of head `name` to the embedding table, if the head has them."""
    if task.delimiters != "learned":
        return params
    table_VD, new_3D = params["embed"]["tokens"], params["heads"][name]["tokens"]
    table_VD = jnp.concatenate([table_VD, new_3D.astype(table_VD.dtype)])
    return params | {"embed": params["embed"] | {"tokens": table_VD}}


def states_of(
    model: ModelConfig,
    task: TaskConfig,
    params: dict,
    name: str,
    batch: Any,
    compute: Compute,
    key: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """Returns the states `[R, T, D]` that the task's loss reads, and the layers' named scalars for the loss.

    The states are those of the last layer, or with `task.layer_mixture` the sum of all layers by the softmax of
    `mix [n_layer + 1]` of head `name`, times its `scale`.
    """
    rows, read = flat(batch), with_learned_tokens(params, name, task)
    inputs = all_inputs(model, compute, read, rows, key)
    if not task.layer_mixture:
        return states_and_extras(model, read, rows.inputs, inputs, compute=compute, key=key)
    head = params["heads"][name]
    weights_L = jax.nn.softmax(head["mix"].astype(jnp.float32)) * head["scale"].astype(jnp.float32)
    return states_and_extras(model, read, rows.inputs, inputs, compute=compute, key=key, layer_weights_L=weights_L)


def flat(batch: Any) -> Any:
    """Reshapes a batch to one row per sequence."""
    if not isinstance(batch, (CandidateBatch, PreferenceBatch)):
        return batch
    lengths = batch.lengths.reshape(-1) if isinstance(batch, CandidateBatch) else None
    return TextBatch(batch.inputs.reshape(-1, batch.inputs.shape[-1]), lengths, batch.targets, batch.weights)


def head_outputs(task: TaskConfig, params: dict, name: str, x_RTD: jax.Array, batch: Any) -> jax.Array:
    """Returns float32 outputs of head `name` for final hidden states: `[B, N]` for texts, `[B, T, N]` for tags of
    words, `[B, K]` for candidates. Missing candidates get `NO_CANDIDATE`.
    """
    if not isinstance(batch, CandidateBatch):
        return state_logits(task, params, name, x_RTD, batch)
    head = params["heads"][name]
    pooled_BKD = pool(x_RTD, batch.lengths.reshape(-1), task.pooling).reshape(*batch.lengths.shape, -1)
    if task.kind not in SCORED:  # both orders of a pair
        return head_logits(head, jnp.sum(pooled_BKD, axis=1))
    return jnp.where(batch.lengths > 0, head_logits(head, pooled_BKD)[..., 0], NO_CANDIDATE)


def output_loss(task: TaskConfig, outputs: jax.Array, batch: Any, smoothing: float = 0.0) -> Loss:
    """Sums the loss of `head_outputs` over a batch."""
    if task.loss:
        return _users_loss(task, outputs, batch)
    if task.kind == "regress":
        return squared_loss(outputs, batch.targets, batch.weights)
    if task.kind in SCORED:
        return label_loss(outputs, batch.targets, batch.weights)
    return label_batch_loss(task, outputs, batch, smoothing)


def _users_loss(task: TaskConfig, outputs: jax.Array, batch: Any) -> Loss:
    """Sums the losses that the function of `task.loss` returns. It is not given unknown targets."""
    known = jnp.isfinite(batch.targets) if task.kind == "regress" else batch.targets >= 0
    if task.kind == "tag":
        known &= batch.targets < outputs.shape[-1]
    targets = jnp.where(known, batch.targets, 0)
    if task.kind == "tag":
        weights = known.astype(jnp.float32)
    else:
        whole_B = known if known.ndim == 1 else jnp.all(known, axis=-1)
        weights = jnp.where(whole_B, batch.weights, 0.0)
    losses = call_function(task.loss, "task.loss", outputs, targets)
    if jnp.shape(losses) != weights.shape:
        raise UserError(
            f"task.loss={task.loss!r}: returned shape {jnp.shape(losses)}, must return {weights.shape}: the loss of"
            f" each {'word' if task.kind == 'tag' else 'row'}"
        )
    total = jnp.sum(jnp.where(weights > 0, losses, 0.0) * weights)
    return Loss(total, total, jnp.sum(weights))


def squared_loss(outputs_BN: jax.Array, targets_BN: jax.Array, weights_B: jax.Array) -> Loss:
    """Sums the mean squared error of each row; rows with a NaN target are ignored."""
    known_B = jnp.all(jnp.isfinite(targets_BN), axis=-1)
    weights_B = jnp.where(known_B, weights_B, 0.0)
    errors_BN = outputs_BN - jnp.where(known_B[:, None], targets_BN, 0.0)
    total = jnp.sum(jnp.mean(jnp.square(errors_BN), axis=-1) * weights_B)
    return Loss(total, total, jnp.sum(weights_B))


def head_states_loss(config: Config, name: str) -> Callable[[dict, jax.Array, Any], Loss]:
    """The loss of head `name`, plus the next-token loss of the same texts if `task.lm_weight` is set."""
    task, smoothing = config.task, config.train.label_smoothing

    def states_loss(params: dict, x_RTD: jax.Array, batch: Any) -> Loss:
        loss = output_loss(task, head_outputs(task, params, name, x_RTD, batch), batch, smoothing)
        if task.bag_of_words:  # a sum of two losses: together, the n-grams would soon fit all rows, and the model none
            models = text_logits(task, params, name, x_RTD, batch)
            own = [output_loss(task, logits, batch, smoothing).objective for logits in models]
            loss = dataclasses.replace(loss, objective=jnp.sum(jnp.stack(own)))
        return with_language_model(config, params, x_RTD, batch, loss)

    return states_loss


def with_language_model(config: Config, params: dict, x_RTD: jax.Array, batch: Any, loss: Loss) -> Loss:
    """Adds `task.lm_weight` times the mean next-token loss."""
    if not config.task.lm_weight:
        return loss
    tokens = token_loss(config.model, loss_options(config.model), params, x_RTD, next_tokens(config.model, batch))
    value = tokens.objective / jnp.maximum(tokens.count, 1.0)
    return with_extras(loss, {"lm_loss": value}, {"lm_loss": config.task.lm_weight})


def next_tokens(model: ModelConfig, batch: Any) -> Batch:
    """Next-token targets for a batch of texts or tagged words; learned tokens are never targets."""
    rows = flat(batch)
    inputs_RT = rows.inputs
    following_RT = jnp.concatenate([inputs_RT[:, 1:], jnp.full_like(inputs_RT[:, :1], -1)], axis=1)
    if isinstance(rows, Batch):  # positions do not increase in padding
        rises_RT = rows.positions[:, 1:] == rows.positions[:, :-1] + 1
        rises_RT &= rows.segments[:, 1:] == rows.segments[:, :-1]
        real_RT = jnp.pad(rises_RT, ((0, 0), (0, 1)))
    else:
        real_RT = jnp.arange(1, inputs_RT.shape[1] + 1)[None] < rows.lengths[:, None]
    known_RT = real_RT & (following_RT >= 0) & (following_RT < model.vocab_size)
    return Batch(inputs=inputs_RT, targets=jnp.where(known_RT, following_RT, -1), segments=None, positions=None)


Predict = Callable[[dict, Any], tuple[jax.Array, jax.Array]]


def make_predict(model: ModelConfig, task: TaskConfig, name: str, compute: Compute) -> Predict:
    """Returns `predict(params, batch) -> (outputs, [nll, count])` of head `name`, to be jitted.

    Outputs are probabilities of labels or candidates, standardized numbers (regress) or scores (reward).
    """

    def predict(params: dict, batch: Any) -> tuple[jax.Array, jax.Array]:
        x_RTD, _ = states_of(model, task, params, name, batch, compute)
        outputs = head_outputs(task, params, name, x_RTD, batch)
        loss = output_loss(task, outputs, batch)
        if task.kind not in ("regress", "reward"):
            outputs = jax.nn.sigmoid(outputs) if task.multi_label else jax.nn.softmax(outputs)
        return outputs, jnp.stack([loss.nll, loss.count])

    return predict
