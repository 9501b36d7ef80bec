"""From a batch to its loss."""

import jax
import jax.numpy as jnp

from gptjax.batches.labelled import TextBatch
from gptjax.batches.pairs import PairBatch
from gptjax.batches.pretraining import Batch, PrefixBatch
from gptjax.config.model import ModelConfig
from gptjax.config.task import TaskConfig
from gptjax.model.bag import bag_logits
from gptjax.model.gpt import Compute, encode, shared_rows, states_and_extras, unembedding
from gptjax.model.heads import head_logits, label_loss, multi_label_loss, pool
from gptjax.model.inputs import BlockInputs
from gptjax.ops.attention_spec import Mask
from gptjax.ops.axes import constrain_batch
from gptjax.ops.cross_entropy import Loss, LossOptions, cross_entropy

AnyBatch = TextBatch | Batch | PrefixBatch | PairBatch
"""A batch of any task; each has `inputs`, `[B, T]`."""


def loss_options(model: ModelConfig, label_smoothing: float = 0.0, z_loss: float = 0.0) -> LossOptions:
    """Options of the next-token loss of a model."""
    return LossOptions(model.vocab_size, label_smoothing, z_loss, model.logit_softcap)


def batch_loss(
    model: ModelConfig,
    options: LossOptions,
    compute: Compute,
    params: dict,
    batch: AnyBatch,
    key: jax.Array | None,
) -> Loss:
    """Sums the next-token loss over a batch of leaves `[B, T]`.

    Args:
        model: Shape of the model.
        options: Options of the loss.
        compute: How the forward pass is computed.
        params: As `init_params` returns them.
        batch: Its `segments` may be None: each sequence is one document.
        key: Dropout key; None: no dropout.
    """
    return token_loss(model, options, params, batch_states(model, compute, params, batch, key), batch)


def token_loss(model: ModelConfig, options: LossOptions, params: dict, x_BTD: jax.Array, batch: AnyBatch) -> Loss:
    """Sums the next-token loss, given final hidden states."""
    w_VD = shared_rows(unembedding(params))
    if model.logit_factor != 1.0:
        x_BTD = x_BTD * jnp.asarray(model.logit_factor, x_BTD.dtype)
    if model.output_bias:  # as a weight of one more channel, which is 1 in all hidden states
        bias_V1 = shared_rows(params["head"]["bias"][:, None]) * model.logit_factor
        w_VD = jnp.concatenate([w_VD, bias_V1.astype(w_VD.dtype)], axis=1)
        x_BTD = jnp.concatenate([x_BTD, jnp.ones((*x_BTD.shape[:-1], 1), x_BTD.dtype)], axis=-1)
    return cross_entropy(options, x_BTD, w_VD, constrain_batch(batch.targets))


def batch_states(
    model: ModelConfig,
    compute: Compute,
    params: dict,
    batch: AnyBatch,
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns the final hidden states `[B, T, D]` of a batch."""
    inputs = all_inputs(model, compute, params, batch, key)
    return states_and_extras(model, params, batch.inputs, inputs, compute=compute, key=key)[0]


def all_inputs(
    model: ModelConfig, compute: Compute, params: dict, batch: AnyBatch, key: jax.Array | None
) -> BlockInputs:
    """`BlockInputs` of a batch, with the encoded source if the batch has source and target pairs."""
    if not isinstance(batch, PairBatch):
        return inputs_of(model, batch)
    memory = encode(model, params, batch.source, batch.lengths, compute=compute, key=key)
    return BlockInputs(positions_of(batch), memory=memory)


def inputs_of(model: ModelConfig, batch: TextBatch | Batch | PrefixBatch) -> BlockInputs:
    """`BlockInputs` of a batch for a decoder-only model."""
    positions_BT = positions_of(batch)
    if isinstance(batch, PrefixBatch):
        return BlockInputs(positions_BT, Mask(batch.segments, batch.ahead))
    if isinstance(batch, Batch):
        return BlockInputs(positions_BT, Mask(batch.segments))
    padded = model.bidirectional  # padding follows the text, so causal attention never attends to it
    return BlockInputs(positions_BT, Mask(keys_BS=positions_BT < batch.lengths[..., None] if padded else None))


def extra_weights(model: ModelConfig) -> dict[str, float]:
    """Weights in the objective of the layers' named scalars."""
    return {"balance_loss": model.balance_loss, "router_z_loss": model.router_z_loss}


def positions_of(batch: AnyBatch) -> jax.Array:
    """Position of each token in its text."""
    # Texts are padded at the end, so their positions need no mask.
    return (
        batch.positions
        if isinstance(batch, Batch | PrefixBatch)
        else jax.lax.broadcasted_iota("int32", batch.inputs.shape, batch.inputs.ndim - 1)
    )


def label_logits(
    model: ModelConfig, task: TaskConfig, compute: Compute, params: dict, name: str, batch: TextBatch | Batch
) -> jax.Array:
    """Returns float32 label logits of head `name`: `[B, N]` for texts, `[B, T, N]` for tags of words."""
    return state_logits(task, params, name, batch_states(model, compute, params, batch), batch)


def state_logits(task: TaskConfig, params: dict, name: str, x_BTD: jax.Array, batch: TextBatch | Batch) -> jax.Array:
    """Like `label_logits`, given final hidden states."""
    if not isinstance(batch, TextBatch):
        return head_logits(params["heads"][name], x_BTD)
    logits = text_logits(task, params, name, x_BTD, batch)
    if not task.bag_of_words:
        return logits[0]
    return (1.0 - task.bag_share) * logits[0] + task.bag_share * logits[1]


def text_logits(task: TaskConfig, params: dict, name: str, x_BTD: jax.Array, batch: TextBatch) -> list[jax.Array]:
    """Returns float32 label logits `[B, N]` of the model and, with `task.bag_of_words`, of the one over n-grams."""
    head = params["heads"][name]
    logits = [head_logits(head, pool(x_BTD, batch.lengths, task.pooling))]
    return [*logits, bag_logits(head, batch.buckets, batch.counts)] if task.bag_of_words else logits


def label_batch_loss(task: TaskConfig, logits: jax.Array, batch: TextBatch | Batch, smoothing: float = 0.0) -> Loss:
    """Sums the loss of label logits over a batch."""
    if isinstance(batch, Batch):
        return label_loss(logits, batch.targets, (batch.targets >= 0).astype("float32"), smoothing)
    if task.multi_label:
        return multi_label_loss(logits, batch.targets, batch.weights)
    return label_loss(logits, batch.targets, batch.weights, smoothing)
