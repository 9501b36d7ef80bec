"""Shared by the implementations of attention: inputs, grouping of query heads, dropout of attention weights.

Shape suffixes: as in `attention_spec.py`; R = H / G query heads per key head, N = R times T.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.ops.attention_spec import NO_MASK, Bias, Mask
from gptjax.ops.elementwise import dropout_keep_at
from gptjax.ops.matmul import row_major


class DroppedWeights(NamedTuple):
    """Determines which attention weights are dropped.

    The random bits of a weight depend only on the key, a row number and the position of the attended key, so they do
    not depend on the device.
    """

    key_data: jax.Array
    rows_BTH: jax.Array
    """uint32: number of each row of weights (one row for each query of each head)."""


class AttentionInputs(NamedTuple):
    """The arrays of a call of attention."""

    q_BTHC: jax.Array
    k_BSGC: jax.Array
    v_BSGC: jax.Array
    mask: Mask = NO_MASK
    bias: Bias | None = None
    drops: DroppedWeights | None = None


def number_weight_rows(key: jax.Array, B: int, T: int, H: int) -> DroppedWeights:
    """Numbers all rows of attention weights of a batch. Numbers may wrap around; rows far apart then share a mask."""
    b, t, h = (jax.lax.broadcasted_iota(jnp.uint32, (B, T, H), axis) for axis in range(3))
    return DroppedWeights(jax.random.key_data(key), (b * jnp.uint32(T) + t) * jnp.uint32(H) + h)


def drop_weights(drops: DroppedWeights, rate: float, weights_BGNS: jax.Array, first: jax.Array | int) -> jax.Array:
    """Applies dropout to attention weights; `first` is the position of the first key.

    It multiplies by a mask, because XLA:CPU fuses a multiplication, but not a select, with the matmuls around it.
    """
    rows_BGRT1 = group_queries(drops.rows_BTH[..., None], weights_BGNS.shape[1])
    columns_S = jnp.arange(weights_BGNS.shape[-1], dtype=jnp.uint32) + jnp.asarray(first, jnp.uint32)
    keep, scale = dropout_keep_at(drops.key_data, merge_rows(rows_BGRT1), columns_S, rate)
    return weights_BGNS * jnp.where(keep, scale, 0.0)


def group_queries(x_BTHC: jax.Array, G: int) -> jax.Array:
    """Groups query heads by their key head: `[B, G, R, T, C]`."""
    B, T, H, C = x_BTHC.shape
    return row_major(x_BTHC.transpose(0, 2, 1, 3)).reshape(B, G, H // G, T, C)


def ungroup_queries(x_BGRTC: jax.Array) -> jax.Array:
    """Inverse of `group_queries`."""
    B, G, R, T, C = x_BGRTC.shape
    return row_major(x_BGRTC.transpose(0, 3, 1, 2, 4)).reshape(B, T, G * R, C)


def merge_rows(x_BGRTC: jax.Array) -> jax.Array:
    """Merges the query heads of a key head with the queries: one matmul instead of R."""
    B, G, R, T, C = x_BGRTC.shape
    return x_BGRTC.reshape(B, G, R * T, C)
