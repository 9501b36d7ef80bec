"""Inputs of every block in addition to the residual stream: positions, masks, the encoded source.

Shape suffixes: B batch, T position, S slot of the cache.
"""

from typing import NamedTuple

import jax

from gptjax.ops.attention_spec import Mask


class MemoryHeads(NamedTuple):
    """Keys and values of the source in one layer."""

    k_BSGC: jax.Array
    v_BSGC: jax.Array


class Memory(NamedTuple):
    """The encoded source that a decoder attends to. Here S is a position of the source."""

    keys_BS: jax.Array
    """False for padding."""
    states_BSD: jax.Array | None = None
    """Final hidden states of the encoder."""
    heads: MemoryHeads | None = None
    """Keys and values that the current layer computed from them, when decoding with a cache."""


class Slots(NamedTuple):
    """Slots of the cache in one layer, for the new tokens."""

    visible_BTS: jax.Array
    """Whether a new token may attend to a slot."""
    distance_NTS: jax.Array
    """Distance from the new token back to the token in the slot; N is 1, or B if sequences differ."""
    used: jax.Array
    """Number of written tokens, see `Cache`."""
    padding_B: jax.Array
    """Number of padding slots at the left of each sequence."""
    capped_BT: jax.Array | None
    """Positions of the new tokens for attention to the first tokens, see `model.attention_sinks`; None: the same as for
    other slots."""


class Earlier(NamedTuple):
    """Activations of earlier layers that a block reads; None if the config does not use them."""

    embedded_BTD: jax.Array | None = None
    """The embeddings, for `model.residual_mix`."""
    values_BTGEC: jax.Array | None = None
    """Values of the first layer, for `model.value_residual`; None in the first layer itself."""
    skipped_BTD: jax.Array | None = None
    """Output of the layer that is paired with this one, for `model.learned_skips`; None in the lower half."""


NOTHING_EARLIER = Earlier()


class BlockInputs(NamedTuple):
    """Positions, masks, and the source of an encoder-decoder. `slots` is set only when decoding with a cache."""

    positions_BT: jax.Array
    """Position of each token in its text."""
    mask: Mask = Mask()
    """Which keys of whole sequences a query may attend to."""
    slots: Slots | None = None
    """Slots of the cache in the current layer."""
    memory: Memory | None = None
    """The encoded source; None for a decoder-only model."""
