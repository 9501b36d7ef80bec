"""Attention with all weights in memory, differentiated by JAX: the reference, which supports every request.

Shape suffixes: as in `attention_spec.py`; R = H / G query heads per key head.
"""

import jax
import jax.numpy as jnp

from gptjax.ops.attention_heads import AttentionInputs, drop_weights, number_weight_rows
from gptjax.ops.attention_spec import (
    CAUSAL,
    HIDDEN,
    NO_MASK,
    AttentionSpec,
    Bias,
    Implementation,
    Mask,
    bias_HTS,
    distance_logits,
    distance_values,
    hidden_BTS,
)


def attention_reference(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    spec: AttentionSpec = CAUSAL,
    mask: Mask = NO_MASK,
    bias: Bias | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Computes `attention.attention` with `plain_attention`; for tests and benchmarks."""
    drops = number_weight_rows(key, *q_BTHC.shape[:3]) if key is not None and spec.dropout else None
    return plain_attention(spec, AttentionInputs(q_BTHC, k_BSGC, v_BSGC, mask, bias, drops))


def plain_attention(spec: AttentionSpec, inputs: AttentionInputs) -> jax.Array:
    """Returns `[B, T, H, C]`; softmax in float32."""
    q_BTHC, k_BSGC, v_BSGC, mask, bias, drops = inputs
    B, T, H, C = q_BTHC.shape
    S, G = k_BSGC.shape[1:3]
    weights = attention_weights(spec, q_BTHC, k_BSGC, mask, bias)
    if drops is not None:
        weights = drop_weights(drops, spec.dropout, weights.reshape(B, G, -1, S), 0).reshape(weights.shape)
    y = jnp.einsum("bgrts,bsgc->btgrc", weights.astype(q_BTHC.dtype), v_BSGC, preferred_element_type=jnp.float32)
    if bias is not None and bias.value_vectors_MC is not None:
        y = y + distance_values(bias.value_vectors_MC, weights, _distances(T, S)[None]).transpose(0, 3, 1, 2, 4)
    return y.astype(q_BTHC.dtype).reshape(B, T, H, C)


def attention_weights(
    spec: AttentionSpec, q_BTHC: jax.Array, k_BSGC: jax.Array, mask: Mask, bias: Bias | None
) -> jax.Array:
    """Returns how much each query attends to each key, float32 `[B, G, R, T, S]`, without dropout."""
    B, T, H, C = q_BTHC.shape
    S, G = k_BSGC.shape[1:3]
    q_BGRTC = q_BTHC.reshape(B, T, G, H // G, C).transpose(0, 2, 3, 1, 4)
    logits = jnp.einsum("bgrtc,bsgc->bgrts", q_BGRTC, k_BSGC, preferred_element_type=jnp.float32)
    if bias is not None and bias.key_vectors_MC is not None:
        logits = logits + distance_logits(bias.key_vectors_MC, q_BGRTC, _distances(T, S)[None])
    logits = logits * spec.logit_scale(C)
    if spec.softcap:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    if bias is not None:
        added = jnp.broadcast_to(bias_HTS(bias, _distances(T, S)), (H, T, S))
        logits = logits + added.reshape(1, G, H // G, T, S)
    return jax.nn.softmax(jnp.where(hidden_BTS(spec, mask, T, S)[:, None, None], HIDDEN, logits), axis=-1)


def _distances(T: int, S: int) -> jax.Array:
    return jnp.arange(T)[:, None] - jnp.arange(S)[None]


PLAIN = Implementation("plain", lambda _: None, plain_attention)
