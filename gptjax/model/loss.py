"""From a batch to its loss."""

import jax

from gptjax.batches.labelled import TextBatch
from gptjax.batches.pretraining import Batch
from gptjax.config import ModelConfig
from gptjax.model.gpt import Compute, hidden_states, unembedding
from gptjax.model.heads import head_logits, label_loss, multi_label_loss, pool
from gptjax.ops.cross_entropy import Loss, LossOptions, cross_entropy
from gptjax.task_options import TaskConfig


def batch_loss(
    model: ModelConfig, options: LossOptions, compute: Compute, params: dict, batch: Batch, key: jax.Array | None
) -> Loss:
    """Sums the next-token loss over a batch of leaves `[B, T]`.

    Args:
        model: Shape of the model.
        options: What is minimised.
        compute: Precision and layout of the computation.
        params: As `init_params` returns them.
        batch: Its `segments` may be None: one document a row.
        key: Randomness for dropout; None: no dropout.
    """
    x_BTD = hidden_states(model, params, batch.inputs, batch.positions, batch.segments, compute=compute, key=key)
    return cross_entropy(options, x_BTD, unembedding(params), batch.targets)


def label_logits(
    model: ModelConfig,
    task: TaskConfig,
    compute: Compute,
    params: dict,
    name: str,
    batch: TextBatch | Batch,
    key: jax.Array | None = None,
) -> jax.Array:
    """Returns float32 logits of the labels of head `name`: `[B, N]` of texts, `[B, T, N]` of word tags."""
    head = params["heads"][name]
    if isinstance(batch, TextBatch):
        # Rows are filled up at their end, which causal attention never looks at.
        positions_BT = jax.lax.broadcasted_iota("int32", batch.inputs.shape, 1)
        x_BTD = hidden_states(model, params, batch.inputs, positions_BT, compute=compute, key=key)
        return head_logits(head, pool(x_BTD, batch.lengths, task.pooling))
    x_BTD = hidden_states(model, params, batch.inputs, batch.positions, batch.segments, compute=compute, key=key)
    return head_logits(head, x_BTD)


def label_batch_loss(task: TaskConfig, logits: jax.Array, batch: TextBatch | Batch, smoothing: float = 0.0) -> Loss:
    """Sums the loss of `label_logits` over the labels of a batch."""
    if isinstance(batch, Batch):
        return label_loss(logits, batch.targets, (batch.targets >= 0).astype("float32"), smoothing)
    if task.multi_label:
        return multi_label_loss(logits, batch.targets, batch.weights)
    return label_loss(logits, batch.targets, batch.weights, smoothing)
