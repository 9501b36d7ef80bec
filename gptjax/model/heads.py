"""Classification heads: from hidden states to label logits and their loss, as functions of `params`.

A head is `heads/NAME/w [N, D]` and `heads/NAME/bias [N]`.

Shape suffixes: B batch, T position, D n_embd, N labels.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from gptjax.model.parameters import INIT_STD, normal
from gptjax.ops.cross_entropy import Loss
from gptjax.ops.matmul import dot


def init_head(width: int, labels: int, key: jax.Array) -> dict:
    """Initializes a head's float32 parameters."""
    return {"w": normal(INIT_STD)(key, (labels, width)), "bias": jnp.zeros(labels)}


def pool(x_BTD: jax.Array, lengths_B: jax.Array, pooling: Literal["last", "mean"]) -> jax.Array:
    """Pools the first `lengths_B` positions of each sequence into one float32 vector `[B, D]`; ignores the padding.

    A sequence of length 0 gives a finite vector without meaning.
    """
    x_BTD = x_BTD.astype(jnp.float32)
    if pooling == "last":
        last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
        return jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0]
    real_BT = jnp.arange(x_BTD.shape[1])[None] < lengths_B[:, None]
    total_BD = jnp.sum(jnp.where(real_BT[..., None], x_BTD, 0.0), axis=1)
    return total_BD / jnp.maximum(lengths_B, 1)[:, None].astype(jnp.float32)


def head_logits(head: dict, x: jax.Array) -> jax.Array:
    """Returns float32 logits `[..., N]` of vectors `[..., D]`."""
    rows = x.reshape(-1, x.shape[-1])
    logits = dot("rd,nd->rn", rows, head["w"].astype(x.dtype), jnp.float32)
    return logits.reshape(*x.shape[:-1], -1) + head["bias"].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def label_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array, smoothing: float = 0.0) -> Loss:
    """Sums the cross-entropy of one label per place; `count` is the sum of the weights.

    Args:
        logits: `[..., N]`, float32.
    targets: `[...]`, label numbers; -1: no label; N or above: a label that the head does not know.
    weights: `[...]`, one per place.
    smoothing: Label smoothing: the share of the target that is spread evenly over the labels.
    """
    known = (targets >= 0) & (targets < logits.shape[-1])
    weights = jnp.where(known, weights, 0.0)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, jnp.where(known, targets, 0)[..., None], axis=-1)[..., 0]
    objective = (1.0 - smoothing) * nll - smoothing * jnp.mean(log_p, axis=-1)
    return Loss(jnp.sum(objective * weights), jnp.sum(nll * weights), jnp.sum(weights))


def multi_label_loss(logits_BN: jax.Array, targets_BN: jax.Array, weights_B: jax.Array) -> Loss:
    """Sums the multi-label loss of each example: the mean over labels of the binary cross-entropy.

    Args:
        logits_BN: Float32.
        targets_BN: 1 if the example has the label, else 0.
        weights_B: One per example.
    """
    signs_BN = 1.0 - 2.0 * targets_BN.astype(jnp.float32)
    nll = jnp.sum(jnp.mean(jax.nn.softplus(signs_BN * logits_BN), axis=-1) * weights_B)
    return Loss(nll, nll, jnp.sum(weights_B))
