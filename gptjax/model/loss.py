"""From a batch to its loss."""

import jax

from gptjax.batches.pretraining import Batch
from gptjax.config import ModelConfig
from gptjax.model.gpt import Compute, hidden_states, unembedding
from gptjax.ops.cross_entropy import Loss, LossOptions, cross_entropy


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
