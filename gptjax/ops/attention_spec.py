"""What attention computes, as a request: a frozen spec, the arrays that mask and bias it, and the sizes it has.

Shape suffixes: B batch, T query position, S key position, H query heads, G key and value heads, C head_dim,
N distance of a query from a key.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.machine.platform import Platform, target_platform

HIDDEN = -1e30  # not -inf: a query that sees no key must not become NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is computed, apart from arrays. Hashable, so it is a static argument."""

    causal: bool = True
    """Whether queries are kept from attending to later keys (the upper triangle of the weights)."""
    window: int = 0
    """Keys that a query attends to, its own included (arXiv:2004.05150, section 3.1); 0: no limit."""
    scale: float = 0.0
    """Factor of the logits; 0: 1 / sqrt(head_dim)."""
    softcap: float = 0.0
    """Logits become `softcap * tanh(logits / softcap)` (arXiv:2408.00118, section 2); 0: unchanged."""
    dropout: float = 0.0
    """Probability of dropping an attention weight, where there is a key to draw with."""

    def logit_scale(self, head_dim: int) -> float:
        """Factor of the logits, with the default resolved."""
        return self.scale or head_dim**-0.5


class Mask(NamedTuple):
    """Which keys a query may attend to, beyond what the spec says; every array may be None."""

    segments_BT: jax.Array | None = None
    """Document of each position: queries attend within their own. Queries and keys are the same positions."""
    prefix_B: jax.Array | None = None
    """Keys before this position are visible to all queries of the row (prefix LM, arXiv:1910.10683, section 3.2.1)."""
    keys_BS: jax.Array | None = None
    """False where a key is padding."""


CAUSAL, NO_MASK = AttentionSpec(), Mask()


class Bias(NamedTuple):
    """What is added to the logits by the distance of query and key; every array may be None."""

    slopes_H: jax.Array | None = None
    """Times minus the distance (ALiBi, arXiv:2108.12409, section 3); constants, no gradient is returned."""
    by_distance_HN: jax.Array | None = None
    """One number for each distance; the first is of the largest negative one, `-(T - 1)` of a query before its key."""


@dataclasses.dataclass(frozen=True)
class Request:
    """All that decides which implementation is used; known while a program is traced."""

    spec: AttentionSpec
    batch: int
    queries: int
    """Query positions."""
    keys: int
    n_head: int
    n_kv_head: int
    head_dim: int
    dtype: str
    platform: Platform
    packed: bool
    """Whether queries, keys and values lie in one array `[B, T, G, E, C]`."""
    segments: bool = False
    prefix: bool = False
    padded_keys: bool = False
    bias: bool = False
    """Whether a bias is added that is more than slopes."""
    slopes: bool = False
    dropout: bool = False


class Implementation(NamedTuple):
    """One way to compute attention, in a file of its own."""

    name: str
    unsupported: Callable[[Request], str | None]
    """Why it cannot compute a request here; None: it can."""
    run: Callable[..., jax.Array]
    """Of spec, queries, keys, values, mask, bias and what is dropped (`attention_heads.Drops`); of spec, the packed
    array and segments where it takes a packed array."""
    takes_packed: bool = False


def make_request(
    spec: AttentionSpec,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    mask: Mask,
    bias: Bias | None,
    key: jax.Array | None,
    packed: bool = False,
) -> Request:
    """Describes a call by the shapes of its queries `[B, T, H, C]` and keys `[B, S, G, C]`, and by its other arrays."""
    B, T, H, C = queries
    return Request(
        spec=spec,
        batch=B,
        queries=T,
        keys=keys[1],
        n_head=H,
        n_kv_head=keys[2],
        head_dim=C,
        dtype=jnp.dtype(dtype).name,
        platform=target_platform(),
        packed=packed,
        segments=mask.segments_BT is not None,
        prefix=mask.prefix_B is not None,
        padded_keys=mask.keys_BS is not None,
        bias=bias is not None and bias.by_distance_HN is not None,
        slopes=bias is not None and bias.slopes_H is not None,
        dropout=key is not None and spec.dropout > 0,
    )


def needs_dense_weights(request: Request) -> str | None:
    """Why only the plain implementation computes a request, whatever the platform; None: others may."""
    if request.queries != request.keys:
        return "queries and keys differ in number"
    if not request.spec.causal:
        return "attention is not causal"
    if request.prefix:
        return "a prefix is visible to all queries"
    if request.padded_keys:
        return "keys are padded"
    if request.bias:
        return "a learned bias by distance is added to the logits"
    return None


def hidden_BTS(spec: AttentionSpec, mask: Mask, T: int, S: int) -> jax.Array:
    """True where a query must not attend to a key, `[B or 1, T, S]`: the definition that every implementation follows.

    Query i is at position i, key j at position j.
    """
    hidden = jnp.zeros((1, T, S), bool)
    if spec.causal:
        upper_triangle_TS = jnp.triu(jnp.ones((T, S), bool), 1)  # keys after the query
        hidden |= upper_triangle_TS[None]
        if mask.prefix_B is not None:
            hidden &= jnp.arange(S)[None, None] >= mask.prefix_B[:, None, None]
    if spec.window:
        distance_TS = jnp.arange(T)[:, None] - jnp.arange(S)[None]
        hidden |= (jnp.abs(distance_TS) >= spec.window)[None]
    if mask.segments_BT is not None:
        hidden |= mask.segments_BT[:, :, None] != mask.segments_BT[:, None, :]
    if mask.keys_BS is not None:
        hidden |= ~mask.keys_BS[:, None, :]
    return hidden


def bias_HTS(bias: Bias, query_T: jax.Array, key_S: jax.Array) -> jax.Array:
    """What a bias adds to the logits of queries and keys at these positions, float32."""
    distance_TS = query_T[:, None] - key_S[None]
    total = jnp.zeros((1, *distance_TS.shape), jnp.float32)
    if bias.slopes_H is not None:
        total = total - bias.slopes_H[:, None, None] * jnp.abs(distance_TS)[None].astype(jnp.float32)
    if bias.by_distance_HN is not None:
        table_HN = bias.by_distance_HN
        middle = table_HN.shape[1] // 2
        total = total + table_HN[:, jnp.clip(distance_TS + middle, 0, table_HN.shape[1] - 1)]
    return total
