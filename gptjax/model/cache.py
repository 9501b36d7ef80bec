"""Keys and values of the tokens so far, so that decoding computes only what is new.

Each layer has arrays of its own: out of a stack of all layers, XLA would copy a layer's for every token.

Shape suffixes: B batch, G key and value heads, S slot, C head_dim, T new positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    k_BGSC: jax.Array
    v_BGSC: jax.Array


class Cache(NamedTuple):
    """Slots fill from the left; every row writes the same slots, so shorter prompts are padded on their left."""

    layers: tuple[LayerCache, ...]
    used: jax.Array
    """Slots filled, an int32 scalar."""
    padding_B: jax.Array
    """Slots at the left of each row that hold no token."""


def init_cache(config: ModelConfig, padding_B: jax.Array, slots: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Returns an empty cache of `slots` positions for `len(padding_B)` rows."""
    shape = (padding_B.shape[0], config.kv_heads, slots, config.head_width)
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer))
    return Cache(layers, jnp.int32(0), padding_B)


def grow_cache(cache: Cache, slots: int) -> Cache:
    """Returns a cache of as many slots, with what this one holds."""

    def put(old_BGSC):
        return jnp.pad(old_BGSC, ((0, 0), (0, 0), (0, slots - old_BGSC.shape[2]), (0, 0)))

    return cache._replace(layers=jax.tree.map(put, cache.layers))


def select_rows(cache: Cache, rows: jax.Array | np.ndarray) -> Cache:
    """Returns a cache of these rows of another one, in this order; a row may be taken several times."""
    layers = jax.tree.map(lambda leaf: leaf[rows], cache.layers)
    return cache._replace(layers=layers, padding_B=cache.padding_B[rows])


def visible_slots(cache: Cache, new: int, window: int) -> jax.Array:
    """Which slots each of `new` positions after the used ones may see: `[B, T, S]`, True where it may.

    `window` is the config's: how many tokens a position sees, itself included; 0: all before it.
    """
    slot = jnp.arange(cache.layers[0].k_BGSC.shape[2])[None, None]
    last = (cache.used + jnp.arange(new))[None, :, None]
    visible = (slot <= last) & (slot >= cache.padding_B[:, None, None])
    return visible & (slot > last - window) if window else visible


def positions(cache: Cache, new: int) -> jax.Array:
    """Positions `[B, T]` of the next `new` tokens, counted from each row's first token; padding gets 0."""
    return jnp.maximum(cache.used + jnp.arange(new)[None] - cache.padding_B[:, None], 0)


def write(layer: LayerCache, used: jax.Array, k_BTGC: jax.Array, v_BTGC: jax.Array) -> LayerCache:
    """Stores new keys and values of one layer behind the used slots."""

    def put(old_BGSC, new_BTGC):
        new_BGTC = new_BTGC.transpose(0, 2, 1, 3).astype(old_BGSC.dtype)
        at = (0, 0, used, 0)
        if old_BGSC.dtype != jnp.bfloat16:
            return jax.lax.dynamic_update_slice(old_BGSC, new_BGTC, at)
        # As bits: XLA:CPU would convert all slots to float32 and back, for every token.
        old_BGSC, new_BGTC = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old_BGSC, new_BGTC))
        written_BGSC = jax.lax.dynamic_update_slice(old_BGSC, new_BGTC, at)
        return jax.lax.bitcast_convert_type(written_BGSC, jnp.bfloat16)

    return LayerCache(put(layer.k_BGSC, k_BTGC), put(layer.v_BGSC, v_BTGC))
