"""Position methods, by name.

A method adds vectors to the embeddings, rotates queries and keys, or adds a bias to the attention logits.

Shape suffixes: B batch, T position, D n_embd, C head_dim, H query heads, N distance, M clipped distance, F frequency of
a pair of channels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.ops.attention_spec import Bias

T5_BUCKETS, T5_DISTANCE = 32, 128
"""Number of buckets of the relative bias; all larger distances share the last bucket (arXiv:1910.10683)."""


class PositionMethod(NamedTuple):
    """The parts of a position method; None for a part that the method does not have."""

    add: Callable[[ModelConfig, jax.Array], jax.Array] | None = None
    """Maps positions `[B, T]` to vectors that are added to the embeddings, float32 `[B, T, D]`."""
    rotate: Callable[[ModelConfig, jax.Array, jax.Array, str], jax.Array] | None = None
    """Rotates heads `[B, T, ..., C]` at positions `[B, T]` in layers of a kind, see `ModelConfig.layer_kind`."""
    bias: Callable[[ModelConfig, jax.Array | None, int], Bias] | None = None
    """Maps a layer's table (if it has one) and the number of key positions to the attention bias."""
    embedding_table: bool = False
    """Whether the model has a learned table `[block_size, D]`."""
    layer_table: Callable[[ModelConfig], tuple[int, ...]] | None = None
    """Shape of the table that each layer learns."""
    slides: bool = True
    """Whether the method depends only on distances, so that a full context can slide by one token."""


def sinusoidal(config: ModelConfig, positions_BT: jax.Array) -> jax.Array:
    """Fixed sinusoidal embeddings (arXiv:1706.03762, section 3.5): sines first, then cosines."""
    half = config.n_embd // 2
    frequencies_F = jnp.exp(-math.log(10_000.0) / half * jnp.arange(half, dtype=jnp.float32))
    angles_BTF = positions_BT[..., None].astype(jnp.float32) * frequencies_F[None, None]
    waves_BTD = jnp.concatenate([jnp.sin(angles_BTF), jnp.cos(angles_BTF)], axis=-1)
    return jnp.pad(waves_BTD, ((0, 0), (0, 0), (0, config.n_embd - 2 * half)))


def rotate(config: ModelConfig, x: jax.Array, positions_BT: jax.Array, kind: str) -> jax.Array:
    """Rotates pairs of channels by angles that grow with the position (RoPE, arXiv:2104.09864, section 3.2).

    Channel i pairs with channel i + half, as in Llama. Partial rotation rotates the first channels.

    Args:
        config: Base frequencies, share of rotated channels, and scaling for longer contexts.
        x: `[B, T, ..., C]`.
        positions_BT: Position of each token.
        kind: Of the layer. Local layers with their own base are not scaled (arXiv:2503.19786, section 2).
    """
    local = config.rope_local_base if kind == "local" else 0.0
    frequencies_F, magnitude = rope_frequencies(config, local or config.rope_base, scaled=not local)
    half = len(frequencies_F)
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies_F)[None, None]
    angles = angles.reshape(*angles.shape[:2], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def rope_frequencies(config: ModelConfig, base: float, scaled: bool = True) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of channels, and the factor of sines and cosines.

    Scaling for longer contexts: linear (arXiv:2306.15595), NTK-aware (the base grows), YaRN (arXiv:2309.00071,
    section 3), and Llama 3's (its model card). `linear` and `yarn` as in `transformers`.
    """
    C = 2 * round(config.rope_fraction * config.head_width / 2)
    factor, original = config.rope_factor, config.rope_original_length or config.block_size
    scaling = config.rope_scaling if scaled else "none"
    if scaling == "ntk":
        base = base * factor ** (C / max(1, C - 2))
    frequencies = base ** (-np.arange(0, C, 2, dtype=np.float64) / C)
    magnitude = 1.0
    if scaling == "linear":
        frequencies = frequencies / factor
    elif scaling == "llama3":
        low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
        turns = original * frequencies / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / factor + smooth * frequencies
    elif scaling == "yarn":
        magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0

        def dim_of(turns: float) -> float:  # the channel pair that makes this many turns over the original length
            return C * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(dim_of(32.0)), 0), min(math.ceil(dim_of(1.0)), C - 1)
        ramp = np.clip((np.arange(C // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        frequencies = frequencies / factor * ramp + frequencies * (1 - ramp)
    return frequencies.astype(np.float32), magnitude


def alibi_slopes(n_head: int) -> np.ndarray:
    """A slope for each head: a geometric sequence (arXiv:2108.12409, section 3). If the number of heads is not a power
    of two, every second slope of the next power of two is appended, as in the authors' code.
    """

    def of_power(count: int) -> list[float]:
        start = 2.0 ** (-8.0 / count)
        return [start ** (i + 1) for i in range(count)]

    power = 2 ** math.floor(math.log2(n_head))
    slopes = of_power(power)
    if power < n_head:
        slopes += of_power(2 * power)[0::2][: n_head - power]
    return np.asarray(slopes, np.float32)


def _alibi(config: ModelConfig, _table: jax.Array | None, _keys: int) -> Bias:
    return Bias(slopes_H=jnp.asarray(alibi_slopes(config.n_head)))


def t5_bucket(distance_N: np.ndarray, bidirectional: bool = False) -> np.ndarray:
    """The bucket of each distance from a query back to a key (arXiv:1910.10683, section 2.1): one per small distance,
    then logarithmic. Causal: keys after the query share bucket 0. Bidirectional: they use the second half of the
    buckets.
    """
    count = T5_BUCKETS // 2 if bidirectional else T5_BUCKETS
    distance = np.abs(distance_N) if bidirectional else np.maximum(distance_N, 0)
    exact = count // 2
    large = np.log(np.maximum(distance, 1) / exact) / np.log(T5_DISTANCE / exact) * (count - exact)
    bucket = np.where(distance < exact, distance, np.minimum(exact + large.astype(np.int64), count - 1))
    return bucket + count * (distance_N < 0) if bidirectional else bucket


def _t5(config: ModelConfig, table_NH: jax.Array | None, keys: int) -> Bias:
    assert table_NH is not None
    distances_N = np.arange(-(keys - 1), keys)
    return Bias(by_distance_HN=table_NH[t5_bucket(distances_N, config.bidirectional)].T)


def _shaw(config: ModelConfig, tables_2MC: jax.Array | None, _keys: int) -> Bias:
    """Vectors of clipped distances (arXiv:1803.02155, section 3), the same for all heads."""
    assert tables_2MC is not None
    return Bias(key_vectors_MC=tables_2MC[0], value_vectors_MC=tables_2MC[1] if config.relative_values else None)


POSITIONS: dict[str, PositionMethod] = {
    "learned": PositionMethod(embedding_table=True, slides=False),
    "none": PositionMethod(),
    "sinusoidal": PositionMethod(add=sinusoidal, slides=False),
    "rope": PositionMethod(rotate=rotate),
    "alibi": PositionMethod(bias=_alibi),
    "shaw": PositionMethod(
        bias=_shaw,
        layer_table=lambda config: (1 + config.relative_values, 2 * config.relative_distance + 1, config.head_width),
    ),
    "t5": PositionMethod(bias=_t5, layer_table=lambda config: (T5_BUCKETS, config.n_head)),
}
"""The method for each value of `model.positions`."""
