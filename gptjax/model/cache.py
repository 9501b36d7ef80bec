"""Keys and values of the tokens so far, so that decoding computes only what is new.

Each layer has arrays of its own: out of a stack of all layers, XLA would copy a layer's for every token.

Shape suffixes: B batch, G key and value heads, S slot, C head_dim, T new positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.model.inputs import Memory


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    k_BGSC: jax.Array
    v_BGSC: jax.Array


class Cache(NamedTuple):
    """Slots fill from the left; token t of a row, its padding counted, is in slot t modulo the slots of a layer.

    A token takes the slot of one that no later token may attend to. So layers with a window need few slots, and where
    positions allow it, a full context slides by a token.

    Either all rows write the same slots, which is faster: then shorter prompts are padded on their left. Or each row
    has its own number of filled slots, so that rows can begin and end at different times.
    """

    layers: tuple[LayerCache, ...]
    used: jax.Array
    """Tokens that were written, int32: a scalar, or `[B]` where each row has its own number."""
    padding_B: jax.Array
    """Slots at the left of each row that hold no token."""
    memory: tuple[Memory, ...] | None = None
    """Of an encoder-decoder: keys and values of the source in each layer."""


def init_cache(
    config: ModelConfig,
    padding_B: jax.Array,
    slots: int,
    dtype: jax.typing.DTypeLike,
    own_lengths: bool = False,
    chunk: int = 0,
) -> Cache:
    """Returns an empty cache of `slots` positions for `len(padding_B)` rows.

    Args:
        config: Shape of the model.
        padding_B: Slots at the left of each row that hold no token.
        slots: Number of slots of a layer.
        dtype: Of keys and values.
        own_lengths: Whether each row fills its slots by itself.
        chunk: Largest number of tokens that are written at once, where those before the last ones are written in chunks
            of this length; layers with a window then have only the slots that it needs. 0: all layers have all slots.
    """
    B, G, C = padding_B.shape[0], config.kv_heads, config.head_width
    shapes = [(B, G, layer_slots(config, n, slots, chunk), C) for n in range(config.n_layer)]
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes)
    return Cache(layers, jnp.zeros(padding_B.shape if own_lengths else (), jnp.int32), padding_B)


def layer_slots(config: ModelConfig, layer: int, slots: int, chunk: int) -> int:
    """Slots of a layer out of `slots`, see `init_cache`: a multiple of the chunk, so that no chunk passes the end."""
    if not chunk or config.layer_kind(layer) != "local":
        return slots
    return min(slots, -(-(config.attention_window + chunk - 1) // chunk) * chunk)


def grow_cache(config: ModelConfig, cache: Cache, slots: int, chunk: int = 0) -> Cache:
    """Returns a cache of as many slots, with what this one holds; `chunk` is that of `init_cache`."""

    def put(old_BGSC, more):
        return jnp.pad(old_BGSC, ((0, 0), (0, 0), (0, more - old_BGSC.shape[2]), (0, 0)))

    layers = (
        LayerCache(*(put(x, layer_slots(config, n, slots, chunk)) for x in layer))
        for n, layer in enumerate(cache.layers)
    )
    return cache._replace(layers=tuple(layers))


def select_rows(cache: Cache, rows: jax.Array | np.ndarray) -> Cache:
    """Returns a cache of these rows of another one, in this order; a row may be taken several times."""
    layers = jax.tree.map(lambda leaf: leaf[rows], cache.layers)
    used = cache.used[rows] if cache.used.ndim else cache.used
    return Cache(layers, used, cache.padding_B[rows], jax.tree.map(lambda leaf: leaf[rows], cache.memory))


def replace_rows(cache: Cache, rows: jax.Array, others: Cache) -> Cache:
    """Returns a cache whose rows, by number, are those of another one; rows whose number is too large are left out."""
    layers = jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), cache.layers, others.layers)
    return cache._replace(layers=layers, used=cache.used.at[rows].set(others.used, mode="drop"))


def visible_slots(config: ModelConfig, cache: Cache, new: int, kind: str, prefix: bool = False) -> jax.Array:
    """Which slots each of `new` positions after the used ones may see in layers of a kind: `[B, T, S]`, True where.

    A position sees as many tokens as the window has, or else as the context, itself included. The new positions of a
    prefix see each other.
    """
    here = [n for n in range(config.n_layer) if (config.layer_kind(n) == "local") == (kind == "local")]
    slots = cache.layers[here[0] if here else 0].k_BGSC.shape[2]
    window = config.attention_window if kind == "local" else config.block_size
    token_N1S = slot_tokens(cache.used, new, slots)[:, None]
    last_NT1 = _next_slots(cache, new)[:, :, None]
    visible = (token_N1S <= last_NT1) & (token_N1S > last_NT1 - window)
    if prefix:
        visible = jnp.abs(token_N1S - last_NT1) < window
    return visible & (token_N1S >= jnp.maximum(cache.padding_B, 0)[:, None, None])


def slot_tokens(used: jax.Array, new: int, slots: int) -> jax.Array:
    """The number of the token in each slot once `new` more are written, `[1 or B, S]`; negative: there is none."""
    last_N1 = jnp.atleast_1d(used)[:, None] + new - 1
    return last_N1 - jnp.mod(last_N1 - jnp.arange(slots)[None], slots)


def positions(cache: Cache, new: int) -> jax.Array:
    """Positions `[B, T]` of the next `new` tokens, counted from each row's first token; padding gets 0."""
    return jnp.maximum(_next_slots(cache, new) - cache.padding_B[:, None], 0)


def _next_slots(cache: Cache, new: int) -> jax.Array:
    """The slots of the next `new` tokens, `[B or 1, T]`."""
    return jnp.atleast_1d(cache.used)[:, None] + jnp.arange(new)[None]


def write(layer: LayerCache, used: jax.Array, k_BTGC: jax.Array, v_BTGC: jax.Array) -> LayerCache:
    """Stores new keys and values of one layer behind the used slots, in place of the oldest once these are all used."""

    def put(old_BGSC, new_BTGC):
        new_BGTC = new_BTGC.transpose(0, 2, 1, 3).astype(old_BGSC.dtype)
        if old_BGSC.dtype != jnp.bfloat16:
            return update(old_BGSC, new_BGTC)
        # As bits: XLA:CPU would convert all slots to float32 and back, for every token.
        old_BGSC, new_BGTC = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (old_BGSC, new_BGTC))
        return jax.lax.bitcast_convert_type(update(old_BGSC, new_BGTC), jnp.bfloat16)

    def update(old_BGSC, new_BGTC):
        if not used.ndim:
            return jax.lax.dynamic_update_slice(old_BGSC, new_BGTC, (0, 0, jnp.mod(used, old_BGSC.shape[2]), 0))
        update_row = jax.lax.dynamic_update_slice
        return jax.vmap(lambda old, new, at: update_row(old, new, (0, at, 0)))(old_BGSC, new_BGTC, used)

    return LayerCache(put(layer.k_BGSC, k_BTGC), put(layer.v_BGSC, v_BTGC))
