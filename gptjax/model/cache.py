"""Keys and values of the tokens so far, so that decoding computes only what is new.

Shape suffixes: L layer, B batch, G key and value heads, S slot, C head_dim, T new positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig


class Cache(NamedTuple):
    """Slots fill from the left; every row writes the same slots, so shorter prompts are padded on their left."""

    k_LBGSC: jax.Array
    v_LBGSC: jax.Array
    used: jax.Array
    """Slots filled, an int32 scalar."""
    padding_B: jax.Array
    """Slots at the left of each row that hold no token."""


def init_cache(config: ModelConfig, padding_B: jax.Array, slots: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Returns an empty cache of `slots` positions for `len(padding_B)` rows."""
    shape = (config.n_layer, padding_B.shape[0], config.kv_heads, slots, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0), padding_B)


def visible_slots(cache: Cache, new: int) -> jax.Array:
    """Which slots each of `new` positions after the used ones may see: `[B, T, S]`, True where it may."""
    slot = jnp.arange(cache.k_LBGSC.shape[3])[None, None]
    last = (cache.used + jnp.arange(new))[None, :, None]
    return (slot <= last) & (slot >= cache.padding_B[:, None, None])


def positions(cache: Cache, new: int) -> jax.Array:
    """Positions `[B, T]` of the next `new` tokens, counted from each row's first token; padding gets 0."""
    return jnp.maximum(cache.used + jnp.arange(new)[None] - cache.padding_B[:, None], 0)


def write(cache: Cache, layer: jax.Array, k_BTGC: jax.Array, v_BTGC: jax.Array) -> Cache:
    """Stores new keys and values of one layer behind the used slots; `used` stays until all layers have written."""

    def put(old_LBGSC, new_BTGC):
        new_LBGSC = new_BTGC.transpose(0, 2, 1, 3)[None].astype(old_LBGSC.dtype)
        return jax.lax.dynamic_update_slice(old_LBGSC, new_LBGSC, (layer, 0, 0, cache.used, 0))

    return cache._replace(k_LBGSC=put(cache.k_LBGSC, k_BTGC), v_LBGSC=put(cache.v_LBGSC, v_BTGC))


def read(cache: Cache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer, `[B, G, S, C]` each."""
    take = jax.lax.dynamic_index_in_dim
    return take(cache.k_LBGSC, layer, keepdims=False), take(cache.v_LBGSC, layer, keepdims=False)
