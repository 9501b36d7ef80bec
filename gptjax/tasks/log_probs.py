"""Log-probabilities of the targets of sequences.

Shape suffixes: R sequences, T position, D n_embd.
"""

import jax
import jax.numpy as jnp

from gptjax.config.model import ModelConfig
from gptjax.model.gpt import logits


def token_log_probs(model: ModelConfig, params: dict, x_RTD: jax.Array, targets_RT: jax.Array) -> jax.Array:
    """Returns the float32 log-probability `[R, T]` of each target, given final hidden states; 0 for targets of -1.

    Memory holds the logits of one sequence at a time; they are recomputed in the backward pass.
    """

    def of_sequence(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_TD, targets_T = row
        log_p_TV = jax.nn.log_softmax(logits(model, params, x_TD[None])[0])
        chosen_T = jnp.take_along_axis(log_p_TV, jnp.maximum(targets_T, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(targets_T >= 0, chosen_T, 0.0)

    return jax.lax.map(jax.checkpoint(of_sequence), (x_RTD, targets_RT))
