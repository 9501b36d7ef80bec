"""What implementations of attention share: queries grouped by their key head, and the dropout of weights.

Shape suffixes: as in `attention_spec.py`; R = H / G query heads per key head, N = R times T.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.ops.elementwise import dropout_keep_at
from gptjax.ops.matmul import row_major


class Drops(NamedTuple):
    """Which weights are dropped: each is named by a row number and its key's position, on every device the same."""

    key_data: jax.Array
    rows_BTH: jax.Array
    """uint32: number of each row of weights; every query of a head has one."""


def number_rows(key: jax.Array, B: int, T: int, H: int) -> Drops:
    """Numbers all rows of weights of a batch. Numbers may wrap around: then rows far apart share what they drop."""
    b, t, h = (jax.lax.broadcasted_iota(jnp.uint32, (B, T, H), axis) for axis in range(3))
    return Drops(jax.random.key_data(key), (b * jnp.uint32(T) + t) * jnp.uint32(H) + h)


def drop(drops: Drops, rate: float, weights_BGNS: jax.Array, first: jax.Array | int) -> jax.Array:
    """Zeroes weights and scales the others up; `first` is the position of the first key.

    XLA:CPU fuses a multiplication, but not a selection, with the matmuls around it.
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
