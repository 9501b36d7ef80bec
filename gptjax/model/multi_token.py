"""Heads that predict tokens after the next one (multi-token prediction, arXiv:2404.19737, section 2).

Each head is a block that reads the decoder's final hidden states; its final norm and output projection are the
decoder's. The heads do not change the prediction of the next token, so they can be removed after training.

Shape suffixes: K heads, B batch, T position, D n_embd.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.batches.pretraining import Batch
from gptjax.config.model import ModelConfig
from gptjax.config.task import AdapterConfig
from gptjax.model.gpt import Compute, apply_blocks, final_norm, init_params
from gptjax.model.loss import inputs_of, token_loss
from gptjax.ops.cross_entropy import Loss, LossOptions


def init_multi_token_heads(model: ModelConfig, heads: int, key: jax.Array) -> dict:
    """Initializes the blocks of all heads, stacked on a leading axis, float32."""
    return {"blocks": init_params(dataclasses.replace(_head_model(model), n_layer=heads, vocab_size=1), key)["blocks"]}


def multi_token_loss(model: ModelConfig, options: LossOptions) -> Callable[[dict, jax.Array, Batch], Loss]:
    """Returns a function of parameters, final hidden states and the batch: the loss of the next token plus that of each
    head. `nll` and `count` are those of the next token.
    """
    head_model = _head_model(model)

    def loss(params: dict, x_BTD: jax.Array, batch: Batch) -> Loss:
        total = token_loss(model, options, params, x_BTD, batch)
        stack, inputs = params["heads"]["ahead"]["blocks"], inputs_of(model, batch)
        heads = jax.tree.leaves(stack)[0].shape[0]
        compute = Compute(x_BTD.dtype.name)  # pyright: ignore[reportArgumentType]: states are in a compute dtype
        outer = {name: part for name, part in params.items() if name not in ("adapters", "prompt", "heads")}

        def one(head: Any, targets_BT: jax.Array) -> Loss:
            own = outer | {"blocks": jax.tree.map(lambda leaf: leaf[None], head)}
            y_BTD, _ = apply_blocks(head_model, own, x_BTD.astype(jnp.float32), inputs, compute=compute)
            y_BTD = final_norm(head_model, own, y_BTD, compute=compute)
            return token_loss(model, options, own, y_BTD, batch._replace(targets=targets_BT))

        # Heads run one after another and are recomputed in the backward pass, so memory holds one head's logits.
        one = jax.checkpoint(one)
        targets_KBT = jnp.stack([targets_ahead(batch, distance) for distance in range(1, heads + 1)])
        _, losses = jax.lax.scan(lambda _, head: (None, one(*head)), None, (stack, targets_KBT))
        means_K = losses.nll / jnp.maximum(losses.count, 1.0)
        extras = {f"loss_{number + 2}_ahead": means_K[number] * total.count for number in range(heads)}
        return dataclasses.replace(
            total, objective=total.objective + jnp.sum(losses.objective), extras=total.extras | extras
        )

    return loss


def targets_ahead(batch: Batch, distance: int) -> jax.Array:
    """The target `distance` positions later, `[B, T]`; -1 if that position is in another document or window."""
    targets_BT = _shifted(batch.targets, distance)
    if batch.segments is None:
        return targets_BT
    return jnp.where(_shifted(batch.segments, distance) == batch.segments, targets_BT, -1)


def _shifted(x_BT: jax.Array, distance: int) -> jax.Array:
    return jnp.pad(x_BT[:, distance:], ((0, 0), (0, distance)), constant_values=-1)[:, : x_BT.shape[1]]


def _head_model(model: ModelConfig) -> ModelConfig:
    """The config of a head's block: the decoder's, with full attention and a dense MLP."""
    default = ModelConfig()
    dense = ("n_expert", "experts_per_token", "expert_width", "n_shared_expert", "expert_capacity", "balance_loss")
    across_layers = ("attention_pattern", "residual_mix", "value_residual", "learned_skips")
    reset = {name: getattr(default, name) for name in (*dense, "router_z_loss", *across_layers)}
    pattern = {"attention_window": 0, "rope_local_base": 0.0, "attention_stride": 0, "attention_summary": 0}
    pattern = pattern if model.attention_pattern else {}
    return dataclasses.replace(model, n_layer=1, dropout=0.0, adapter=AdapterConfig(), **reset, **pattern)
