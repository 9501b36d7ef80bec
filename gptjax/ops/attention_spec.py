"""Describes an attention call: a frozen spec, the mask and bias arrays, and a `Request` with all shapes.

Shape suffixes: B batch, T query position, S key position, H query heads, G key and value heads, C head_dim,
N distance between query and key, M clipped distance, R = H / G query heads per key head.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.machine.platform import Platform, target_platform

HIDDEN = -1e30  # not -inf: a query without visible keys must not become NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Options of attention that are not arrays. Hashable, so it can be a static argument of `jit`."""

    causal: bool = True
    """Hides later keys from a query (the upper triangle of the weights)."""
    window: int = 0
    """Number of keys that a query attends to, its own included (arXiv:2004.05150, section 3.1); 0: no limit."""
    sinks: int = 0
    """First tokens of a text that stay visible past the window (arXiv:2309.17453)."""
    stride: int = 0
    """Sparse pattern: a query attends to the last `stride` keys, and to every key whose distance is a multiple of it
    (arXiv:1904.10509, section 4.3); 0: none."""
    summary: int = 0
    """The fixed pattern in place of the strided one: a query attends to its own block of `stride` positions, and to the
    last `summary` positions of every block."""
    scale: float = 0.0
    """Factor of the logits; 0: 1 / sqrt(head_dim)."""
    softcap: float = 0.0
    """Logits become `softcap * tanh(logits / softcap)` (arXiv:2408.00118, section 2); 0: unchanged."""
    dropout: float = 0.0
    """Probability of dropping an attention weight. It has an effect only in calls that pass a PRNG key."""

    def logit_scale(self, head_dim: int) -> float:
        """Factor of the logits, with the default resolved."""
        return self.scale or head_dim**-0.5

    @property
    def sparse(self) -> bool:
        """Whether a query attends to other keys than a contiguous range."""
        return self.sinks > 0 or self.stride > 0


class Mask(NamedTuple):
    """Array-valued limits on the keys that a query may attend to; every array may be None."""

    segments_BT: jax.Array | None = None
    """Document number of each position. A query attends only within its document. Requires self-attention (S = T)."""
    ahead_BS: jax.Array | None = None
    """True where a key is also visible to the queries before it (prefix LM, arXiv:1910.10683, section 3.2.1)."""
    keys_BS: jax.Array | None = None
    """False where a key is padding."""
    positions_BT: jax.Array | None = None
    """Position of each token in its text, for sparse patterns; None: 0, 1, 2 and so on."""


CAUSAL, NO_MASK = AttentionSpec(), Mask()


class Bias(NamedTuple):
    """What attention adds by the distance between query and key; every array may be None."""

    slopes_H: jax.Array | None = None
    """ALiBi: adds `-slope * distance` (arXiv:2108.12409, section 3). Constants; they get no gradient."""
    by_distance_HN: jax.Array | None = None
    """Learned bias for each distance, query position minus key position, in ascending order from `-(T - 1)`."""
    key_vectors_MC: jax.Array | None = None
    """Learned vectors added to keys, by distance from `-(M // 2)` to `M // 2` (arXiv:1803.02155, equation 4)."""
    value_vectors_MC: jax.Array | None = None
    """Those added to values (equation 3)."""

    @property
    def learned(self) -> bool:
        """Whether a parameter is among them, which only the plain implementation supports."""
        return self.by_distance_HN is not None or self.key_vectors_MC is not None


@dataclasses.dataclass(frozen=True)
class Request:
    """Everything that the choice of an implementation depends on; known at trace time."""

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
    """Whether queries, keys and values are one array `[B, T, G, E, C]`."""
    segments: bool = False
    ahead: bool = False
    padded_keys: bool = False
    bias: bool = False
    """Whether something learned is added by distance (`Bias.learned`)."""
    slopes: bool = False
    dropout: bool = False


class Implementation(NamedTuple):
    """One way to compute attention; each has its own file."""

    name: str
    unsupported: Callable[[Request], str | None]
    """Returns why it cannot compute a request here, or None if it can."""
    run: Callable[..., jax.Array]
    """`run(spec, inputs)` with `attention_heads.AttentionInputs`; or `run(spec, qkv_BTGEC, segments_BT)` if
    `takes_packed`."""
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
    """Describes a call by the shapes of its queries `[B, T, H, C]` and keys `[B, S, G, C]`, and its other arguments."""
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
        ahead=mask.ahead_BS is not None,
        padded_keys=mask.keys_BS is not None,
        bias=bias is not None and bias.learned,
        slopes=bias is not None and bias.slopes_H is not None,
        dropout=key is not None and spec.dropout > 0,
    )


def needs_dense_weights(request: Request) -> str | None:
    """Returns why only the plain implementation supports a request on any platform; None: others may support it."""
    if request.queries != request.keys:
        return "queries and keys differ in number"
    if not request.spec.causal:
        return "attention is not causal"
    if request.ahead:
        return "a prefix is visible to all queries"
    if request.padded_keys:
        return "keys are padded"
    if request.bias:
        return "a learned bias by distance is added to the logits, or vectors to keys"
    return None


def exceeds_fused_kernel(request: Request, dropout_supported: bool = False) -> str | None:
    """Returns why a fused kernel that only masks and scales the logits cannot compute a request; None: it can."""
    if reason := needs_dense_weights(request):
        return reason
    if request.spec.sparse:
        return "the visible keys are no contiguous range"
    if request.dropout and not dropout_supported:
        return "attention weights have dropout"
    if request.spec.softcap or request.slopes:
        return "logits are capped or biased"
    return None


def hidden_BTS(spec: AttentionSpec, mask: Mask, T: int, S: int) -> jax.Array:
    """Returns True where a query must not attend to a key, `[B or 1, T, S]`. Every implementation follows this mask.

    Query i is at position i, key j at position j, unless the mask has positions for the pattern.
    """
    hidden = jnp.zeros((1, T, S), bool)
    if spec.causal:
        upper_triangle_TS = jnp.triu(jnp.ones((T, S), bool), 1)  # keys after the query
        hidden |= upper_triangle_TS[None]
        if mask.ahead_BS is not None:
            hidden &= ~mask.ahead_BS[:, None, :]
    if mask.positions_BT is not None and spec.sparse:
        hidden |= outside_pattern(spec, mask.positions_BT[:, :, None], mask.positions_BT[:, None])
    elif spec.window or spec.sparse:
        hidden |= outside_pattern(spec, jnp.arange(T)[:, None], jnp.arange(S)[None])[None]
    if mask.segments_BT is not None:
        hidden |= mask.segments_BT[:, :, None] != mask.segments_BT[:, None, :]
    if mask.keys_BS is not None:
        hidden |= ~mask.keys_BS[:, None, :]
    return hidden


def outside_pattern(spec: AttentionSpec, query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns True where the pattern hides a key, by positions in a text that broadcast against each other."""
    distance = jnp.abs(query - key)
    if spec.summary:
        return (query // spec.stride != key // spec.stride) & (key % spec.stride < spec.stride - spec.summary)
    if spec.stride:
        return (distance >= spec.stride) & (distance % spec.stride != 0)
    hidden = distance >= spec.window if spec.window else jnp.zeros(distance.shape, bool)
    return hidden & (key >= spec.sinks) if spec.sinks else hidden


def bias_HTS(bias: Bias, distance_TS: jax.Array) -> jax.Array:
    """Returns the numbers to add to the logits of queries so far behind their keys, float32 `[H or 1, T, S]`."""
    total = jnp.zeros((1, *distance_TS.shape), jnp.float32)
    if bias.slopes_H is not None:
        total = total - bias.slopes_H[:, None, None] * jnp.abs(distance_TS)[None].astype(jnp.float32)
    if bias.by_distance_HN is not None:
        table_HN = bias.by_distance_HN
        middle = table_HN.shape[1] // 2
        total = total + table_HN[:, jnp.clip(distance_TS + middle, 0, table_HN.shape[1] - 1)]
    return total


def distance_logits(vectors_MC: jax.Array, q_BGRTC: jax.Array, distance_NTS: jax.Array) -> jax.Array:
    """Returns what `Bias.key_vectors_MC` adds to logits before their scale, `[B, G, R, T, S]`; N is 1 or B."""
    by_distance = jnp.einsum(
        "bgrtc,mc->bgrtm", q_BGRTC, vectors_MC.astype(q_BGRTC.dtype), preferred_element_type=jnp.float32
    )
    chosen_BTSM = _chosen(vectors_MC, distance_NTS, q_BGRTC.shape[0])
    return jnp.einsum("bgrtm,btsm->bgrts", by_distance, chosen_BTSM, precision="highest")


def distance_values(vectors_MC: jax.Array, weights_BGRTS: jax.Array, distance_NTS: jax.Array) -> jax.Array:
    """Returns what `Bias.value_vectors_MC` adds to outputs, float32 `[B, G, R, T, C]`."""
    chosen_BTSM = _chosen(vectors_MC, distance_NTS, weights_BGRTS.shape[0])
    by_distance = jnp.einsum("bgrts,btsm->bgrtm", weights_BGRTS, chosen_BTSM, precision="highest")
    return jnp.einsum("bgrtm,mc->bgrtc", by_distance, vectors_MC.astype(jnp.float32))


def _chosen(vectors_MC: jax.Array, distance_NTS: jax.Array, batch: int) -> jax.Array:
    """Which vector belongs to a query and a key, as a one-hot axis: matmuls with it have a fast gradient."""
    M = vectors_MC.shape[0]
    chosen_NTSM = jax.nn.one_hot(jnp.clip(distance_NTS, -(M // 2), M // 2) + M // 2, M, dtype=jnp.float32)
    return jnp.broadcast_to(chosen_NTSM, (batch, *chosen_NTSM.shape[1:]))
