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
    """Slots fill from the left.

    Either all rows write the same slots, which is faster: then shorter prompts are padded on their left. Or each row
    has its own number of filled slots, so that rows can begin and end at different times.
    """

    layers: tuple[LayerCache, ...]
    used: jax.Array
    """Slots filled, int32: a scalar, or `[B]` where each row has its own number."""
    padding_B: jax.Array
    """Slots at the left of each row that hold no token."""


def init_cache(
    config: ModelConfig, padding_B: jax.Array, slots: int, dtype: jax.typing.DTypeLike, own_lengths: bool = False
) -> Cache:
    """Returns an empty cache of `slots` positions for `len(padding_B)` rows.

    `own_lengths`: whether each row fills its slots by itself.
    """
    shape = (padding_B.shape[0], config.kv_heads, slots, config.head_width)
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layer))
    return Cache(layers, jnp.zeros(padding_B.shape if own_lengths else (), jnp.int32), padding_B)


def grow_cache(cache: Cache, slots: int) -> Cache:
    """Returns a cache of as many slots, with what this one holds."""

    def put(old_BGSC):
        return jnp.pad(old_BGSC, ((0, 0), (0, 0), (0, slots - old_BGSC.shape[2]), (0, 0)))

    return cache._replace(layers=jax.tree.map(put, cache.layers))


def select_rows(cache: Cache, rows: jax.Array | np.ndarray) -> Cache:
    """Returns a cache of these rows of another one, in this order; a row may be taken several times."""
    layers = jax.tree.map(lambda leaf: leaf[rows], cache.layers)
    used = cache.used[rows] if cache.used.ndim else cache.used
    return Cache(layers, used, cache.padding_B[rows])


def replace_rows(cache: Cache, rows: jax.Array, others: Cache) -> Cache:
    """Returns a cache whose rows, by number, are those of another one; rows whose number is too large are left out."""
    layers = jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), cache.layers, others.layers)
    return cache._replace(layers=layers, used=cache.used.at[rows].set(others.used, mode="drop"))


def visible_slots(cache: Cache, new: int, window: int) -> jax.Array:
    """Which slots each of `new` positions after the used ones may see: `[B, T, S]`, True where it may.

    `window` is the config's: how many tokens a position sees, itself included; 0: all before it.
    """
    slot = jnp.arange(cache.layers[0].k_BGSC.shape[2])[None, None]
    last = _next_slots(cache, new)[:, :, None]
    visible = (slot <= last) & (slot >= cache.padding_B[:, None, None])
    return visible & (slot > last - window) if window else visible


def positions(cache: Cache, new: int) -> jax.Array:
    """Positions `[B, T]` of the next `new` tokens, counted from each row's first token; padding gets 0."""
    return jnp.maximum(_next_slots(cache, new) - cache.padding_B[:, None], 0)


def _next_slots(cache: Cache, new: int) -> jax.Array:
    """The slots of the next `new` tokens, `[B or 1, T]`."""
    return jnp.atleast_1d(cache.used)[:, None] + jnp.arange(new)[None]


def write(layer: LayerCache, used: jax.Array, k_BTGC: jax.Array, v_BTGC: jax.Array) -> LayerCache:
    """Stores new keys and values of one layer behind the used slots."""

    def put(old_BGSC, new_BTGC):
        new_BGTC = new_BTGC.transpose(0, 2, 1, 3).astype(old_BGSC.dtype)
        if old_BGSC.dtype != jnp.bfloat16:
            return update(old_BGSC, new_BGTC)
        # As bits: XLA:CPU would convert all slots to float32 and back, for every token.
        old_BGSC, new_BGTC = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old_BGSC, new_BGTC))
        return jax.lax.bitcast_convert_type(update(old_BGSC, new_BGTC), jnp.bfloat16)

    def update(old_BGSC, new_BGTC):
        if not used.ndim:
            return jax.lax.dynamic_update_slice(old_BGSC, new_BGTC, (0, 0, used, 0))
        update_row = jax.lax.dynamic_update_slice
        return jax.vmap(lambda old, new, at: update_row(old, new, (0, at, 0)))(old_BGSC, new_BGTC, used)

    return LayerCache(put(layer.k_BGSC, k_BTGC), put(layer.v_BGSC, v_BTGC))
