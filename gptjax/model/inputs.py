"""What every block reads beside the residual stream.

Shape suffixes: B batch, T position, S slot of the cache.
"""

from typing import NamedTuple

import jax

from gptjax.ops.attention_spec import Mask


class MemoryHeads(NamedTuple):
    """Keys and values that one layer makes of the source."""

    k_BSGC: jax.Array
    v_BSGC: jax.Array


class Memory(NamedTuple):
    """What a decoder reads of the source; S is a position of the source here."""

    keys_BS: jax.Array
    """False where the source is padding."""
    states_BSD: jax.Array | None = None
    """Final hidden states of the encoder."""
    heads: MemoryHeads | None = None
    """What the layer at hand made of them, while decoding with a cache."""


class BlockInputs(NamedTuple):
    """Positions and masks, and the source of an encoder-decoder; `used` and what follows is set while decoding with a
    cache.
    """

    positions_BT: jax.Array
    """Position of each token in its text."""
    mask: Mask = Mask()
    """Which keys of whole sequences a query may attend to."""
    used: jax.Array | None = None
    """Slots of the cache that are filled."""
    full_BTS: jax.Array | None = None
    """Slots that each new token may attend to in layers without window."""
    local_BTS: jax.Array | None = None
    """The same in layers with a window."""
    memory: Memory | None = None
    """The source; None: a decoder alone."""

    def visible(self, kind: str) -> jax.Array:
        """Slots that new tokens may attend to in layers of a kind."""
        visible_BTS = self.local_BTS if kind == "local" else self.full_BTS
        assert visible_BTS is not None  # it is set wherever there is a cache
        return visible_BTS
