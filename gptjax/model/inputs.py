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


class BlockInputs(NamedTuple):
    """Positions, masks, and the source of an encoder-decoder. `used`, `full_BTS` and `local_BTS` are set only when
    decoding with a cache.
    """

    positions_BT: jax.Array
    """Position of each token in its text."""
    mask: Mask = Mask()
    """Which keys of whole sequences a query may attend to."""
    used: jax.Array | None = None
    """Number of filled slots of the cache."""
    full_BTS: jax.Array | None = None
    """Slots to which each new token may attend in layers without a window."""
    local_BTS: jax.Array | None = None
    """The same in layers with a window."""
    memory: Memory | None = None
    """The encoded source; None for a decoder-only model."""

    def visible(self, kind: str) -> jax.Array:
        """Slots to which new tokens may attend in layers of a kind."""
        visible_BTS = self.local_BTS if kind == "local" else self.full_BTS
        assert visible_BTS is not None  # `Decoder` sets it with every cache
        return visible_BTS
