"""The KV cache: keys and values of earlier tokens, so that decoding computes only the new ones.

Each layer has its own arrays. If they were stacked, XLA would copy a layer's slice for every token.

Shape suffixes: B batch, G key and value heads, S slot, C head_dim, T new positions, K slots of first tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.model.inputs import Memory, Slots
from gptjax.ops.attention_spec import AttentionSpec, outside_pattern


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    k_BGSC: jax.Array
    v_BGSC: jax.Array


class Cache(NamedTuple):
    """Each layer is a ring buffer: token t of a sequence (counting padding) is in slot t modulo the number of slots.

    A new token overwrites one to which no later token may attend. So layers with a window need few slots, and for
    position methods that allow it, a full context slides by one token. With `model.attention_sinks` a layer has as many
    slots in front, for the first tokens of each sequence.

    Either all sequences write the same slots: that is faster, and shorter prompts are padded on the left. Or each
    sequence has its own number of filled slots, so that sequences can begin and end at different times.
    """

    layers: tuple[LayerCache, ...]
    used: jax.Array
    """Number of written tokens, int32: a scalar, or `[B]` if each sequence has its own number."""
    padding_B: jax.Array
    """Number of padding slots at the left of each sequence."""
    memory: tuple[Memory, ...] | None = None
    """Keys and values of the source in each layer of an encoder-decoder."""


def init_cache(
    config: ModelConfig,
    padding_B: jax.Array,
    slots: int,
    dtype: jax.typing.DTypeLike,
    own_lengths: bool = False,
    chunk: int = 0,
) -> Cache:
    """Returns an empty cache of `slots` positions for `len(padding_B)` sequences.

    Args:
        config: Shape of the model.
        padding_B: Number of padding slots at the left of each sequence.
        slots: Number of slots of a layer.
        dtype: Of keys and values.
        own_lengths: Whether each sequence has its own number of filled slots.
        chunk: Prompts are written in chunks of this many tokens, and no write is longer; layers with a window then
            have only the slots that the window needs. 0: all layers have all slots.
    """
    B, G, C = padding_B.shape[0], config.kv_heads, config.head_width
    shapes = [(B, G, layer_slots(config, n, slots, chunk) + config.attention_sinks, C) for n in range(config.n_layer)]
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes)
    return Cache(layers, jnp.zeros(padding_B.shape if own_lengths else (), jnp.int32), padding_B)


def layer_slots(config: ModelConfig, layer: int, slots: int, chunk: int) -> int:
    """Number of slots of a layer without those of first tokens, see `init_cache`: a multiple of the chunk, so that no
    chunk wraps around.
    """
    if not chunk or config.layer_kind(layer) != "local":
        return slots
    return min(slots, -(-(config.attention_window + chunk - 1) // chunk) * chunk)


def grow_cache(config: ModelConfig, cache: Cache, slots: int, chunk: int = 0) -> Cache:
    """Returns a copy of the cache with more slots; `chunk` is that of `init_cache`."""

    def pad(old_BGSC, more):
        more += config.attention_sinks - old_BGSC.shape[2]
        return jnp.pad(old_BGSC, ((0, 0), (0, 0), (0, more), (0, 0)))

    layers = (
        LayerCache(*(pad(x, layer_slots(config, n, slots, chunk)) for x in layer))
        for n, layer in enumerate(cache.layers)
    )
    return cache._replace(layers=tuple(layers))


def select_rows(cache: Cache, rows: jax.Array | np.ndarray) -> Cache:
    """Returns a cache of the sequences `rows` of another one, in this order; a sequence may occur several times."""
    layers = jax.tree.map(lambda leaf: leaf[rows], cache.layers)
    used = cache.used[rows] if cache.used.ndim else cache.used
    return Cache(layers, used, cache.padding_B[rows], jax.tree.map(lambda leaf: leaf[rows], cache.memory))


def replace_rows(cache: Cache, rows: jax.Array, others: Cache) -> Cache:
    """Returns a cache in which the sequences `rows` are those of `others`; numbers out of range are ignored."""
    layers = jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), cache.layers, others.layers)
    return cache._replace(layers=layers, used=cache.used.at[rows].set(others.used, mode="drop"))


def copy_tokens(cache: Cache, others: Cache, rows: jax.Array, used: jax.Array, count: int, sinks: int) -> Cache:
    """Returns a cache with `count` tokens of each of `others` in the sequences `rows`, those after `used` ones.

    They must not wrap around. `sinks` is the number of slots of first tokens, which are copied too.
    """
    parts = jax.tree.map(_bits, others.layers)

    def copy(n: jax.Array, layers: Any) -> Any:
        def put(old_BGSC, new_PGSC):
            for first, length in ((sinks + used[n], count), *(((0, sinks),) if sinks else ())):
                size = (1, old_BGSC.shape[1], length, old_BGSC.shape[3])
                new_1GNC = jax.lax.dynamic_slice(new_PGSC, (n, 0, first, 0), size)
                old_BGSC = jax.lax.dynamic_update_slice(old_BGSC, new_1GNC, (rows[n], 0, first, 0))
            return old_BGSC

        return jax.tree.map(put, layers, parts)

    layers = jax.lax.fori_loop(0, rows.shape[0], copy, jax.tree.map(_bits, cache.layers))
    return cache._replace(layers=jax.tree.map(lambda old, new: _from_bits(new, old.dtype), cache.layers, layers))


def layer_view(config: ModelConfig, cache: Cache, new: int, layer: int, spec: AttentionSpec, prefix: bool) -> Slots:
    """The slots of a layer for `new` new tokens; `spec` is the layer's attention."""
    slides = config.attention_sinks > 0 and not cache.used.ndim  # sequences with their own number of slots do not slide
    return Slots(
        visible_slots(config, cache, new, layer, spec, prefix),
        distances(config, cache, new, layer),
        cache.used,
        cache.padding_B,
        jnp.minimum(positions(cache, new), config.block_size - 1) if slides else None,
    )


def visible_slots(
    config: ModelConfig, cache: Cache, new: int, layer: int, spec: AttentionSpec, prefix: bool = False
) -> jax.Array:
    """The mask `[B, T, S]` of slots of a layer to which each of `new` new positions may attend.

    A position attends to as many tokens as the window or the context has, including itself. With `prefix`, the new
    positions also attend to later ones.
    """
    sinks, slots = config.attention_sinks, cache.layers[layer].k_BGSC.shape[2] - config.attention_sinks
    window = spec.window or config.block_size - sinks
    token_N1S = slot_tokens(cache.used, new, slots)[:, None]
    last_NT1 = _next_slots(cache, new)[:, :, None]
    padding_B11 = jnp.maximum(cache.padding_B, 0)[:, None, None]
    visible = (token_N1S <= last_NT1) & (token_N1S > last_NT1 - window)
    if prefix:
        visible = jnp.abs(token_N1S - last_NT1) < window
    visible = visible & (token_N1S >= padding_B11 + sinks)
    if spec.stride:
        visible &= ~outside_pattern(spec, last_NT1 - padding_B11, token_N1S - padding_B11)
    if not sinks:
        return visible
    first_11K, position_BT1 = jnp.arange(sinks)[None, None], last_NT1 - padding_B11
    seen = first_11K <= (position_BT1[:, -1:] if prefix else position_BT1)
    if spec.stride:
        seen &= ~outside_pattern(spec, position_BT1, first_11K)
    return jnp.concatenate([jnp.broadcast_to(seen, (*visible.shape[:2], sinks)), visible], axis=2)


def distances(config: ModelConfig, cache: Cache, new: int, layer: int) -> jax.Array:
    """Distance from each of `new` positions after the used ones back to the token in each slot, `[1 or B, T, S]`.

    With attention sinks, the distance to a first token stops growing when the context is full (arXiv:2309.17453,
    section 3.2).
    """
    sinks, slots = config.attention_sinks, cache.layers[layer].k_BGSC.shape[2] - config.attention_sinks
    distance_NTS = _next_slots(cache, new)[:, :, None] - slot_tokens(cache.used, new, slots)[:, None]
    if not sinks:
        return distance_NTS
    position_BT1 = jnp.minimum(positions(cache, new), config.block_size - 1)[:, :, None]
    first = position_BT1 - jnp.arange(sinks)[None, None]
    return jnp.concatenate([first, jnp.broadcast_to(distance_NTS, (*first.shape[:2], slots))], axis=2)


def slot_tokens(used: jax.Array, new: int, slots: int) -> jax.Array:
    """The number of the token in each slot after `new` more are written, `[1 or B, S]`; negative if it is empty."""
    last_N1 = jnp.atleast_1d(used)[:, None] + new - 1
    return last_N1 - jnp.mod(last_N1 - jnp.arange(slots)[None], slots)


def positions(cache: Cache, new: int) -> jax.Array:
    """Positions `[B, T]` of the next `new` tokens, counted from each sequence's first token; padding gets 0."""
    return jnp.maximum(_next_slots(cache, new) - cache.padding_B[:, None], 0)


def _next_slots(cache: Cache, new: int) -> jax.Array:
    """The slots of the next `new` tokens, `[B or 1, T]`."""
    return jnp.atleast_1d(cache.used)[:, None] + jnp.arange(new)[None]


def write(layer: LayerCache, slots: Slots, sinks: int, k_BTGC: jax.Array, v_BTGC: jax.Array) -> LayerCache:
    """Stores new keys and values of one layer after the used slots; a full layer overwrites its oldest slots.

    The first `sinks` slots hold the first tokens of each sequence.
    """
    used = slots.used

    def put(old_BGSC, new_BTGC):
        new_BGTC = new_BTGC.transpose(0, 2, 1, 3).astype(old_BGSC.dtype)
        return _from_bits(update(_bits(old_BGSC), _bits(new_BGTC)), old_BGSC.dtype)

    def update(old_BGSC, new_BGTC):
        if sinks:
            old_BGSC = jax.lax.dynamic_update_slice(old_BGSC, first_tokens(old_BGSC, new_BGTC), (0, 0, 0, 0))
        at = sinks + jnp.mod(used, old_BGSC.shape[2] - sinks)
        if not used.ndim:
            return jax.lax.dynamic_update_slice(old_BGSC, new_BGTC, (0, 0, at, 0))
        update_row = jax.lax.dynamic_update_slice
        return jax.vmap(lambda old, new, at: update_row(old, new, (0, at, 0)))(old_BGSC, new_BGTC, at)

    def first_tokens(old_BGSC, new_BGTC):
        number_BK = jnp.maximum(slots.padding_B, 0)[:, None] + jnp.arange(sinks)[None] - used.reshape(-1, 1)
        is_new_BK = (number_BK >= 0) & (number_BK < new_BGTC.shape[2])
        found_BGKC = jnp.take_along_axis(new_BGTC, jnp.where(is_new_BK, number_BK, 0)[:, None, :, None], axis=2)
        return jnp.where(is_new_BK[:, None, :, None], found_BGKC, old_BGSC[:, :, :sinks])

    return LayerCache(put(layer.k_BGSC, k_BTGC), put(layer.v_BGSC, v_BTGC))


def _bits(x: jax.Array) -> jax.Array:
    """The bits of bfloat16 numbers as integers; others unchanged. XLA:CPU would convert all bfloat16 slots to float32
    and back for every update.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The numbers of `_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)
