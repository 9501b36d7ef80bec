"""Adapters for parameter-efficient fine-tuning, and merging LoRA into the weights.

Shape suffixes: L layer, B batch, T position, S key position, D n_embd, G key and value heads, C head_dim, R rank,
P learned vectors.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.model import ModelConfig
from gptjax.config.task import AdapterConfig
from gptjax.model.parameters import INIT_STD, normal
from gptjax.ops.attention import cached_attention_reference
from gptjax.ops.attention_spec import AttentionSpec, Mask, hidden_BTS
from gptjax.ops.elementwise import dropout, gelu
from gptjax.ops.matmul import add_bias, matmul


class LowRank(nnx.Module):
    """Adds `(x A) B alpha / rank` to the output of a weight; initially zero (arXiv:2106.09685, section 4.1)."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: tuple[int, ...], *, rngs: nnx.Rngs):
        rank = config.adapter.rank
        self.a = nnx.Param(normal(inputs**-0.5)(rngs.params(), (inputs, rank)))
        self.b = nnx.Param(jnp.zeros((rank, *outputs)))
        self.scale, self.dropout = config.adapter.alpha / rank, config.adapter.dropout

    def __call__(self, x: jax.Array, key: jax.Array | None, out_dtype: jax.typing.DTypeLike) -> jax.Array:
        hidden = matmul(dropout(x, self.dropout, key), self.a[...], x.dtype)
        return jnp.multiply(matmul(hidden, self.b[...], out_dtype), jnp.asarray(self.scale, out_dtype))


class Bottleneck(nnx.Module):
    """Adds a two-layer MLP of a sublayer's output to that output; initially zero (arXiv:1902.00751, section 2.1)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, rank = config.n_embd, config.adapter.rank
        self.w_down = nnx.Param(normal(D**-0.5)(rngs.params(), (D, rank)))
        self.b_down = nnx.Param(jnp.zeros(rank))
        self.w_up = nnx.Param(jnp.zeros((rank, D)))
        self.b_up = nnx.Param(jnp.zeros(D))
        self.dropout = config.adapter.dropout

    def __call__(self, y_BTD: jax.Array, dtype: jax.typing.DTypeLike, key: jax.Array | None) -> jax.Array:
        """Takes and returns the float32 output of a sublayer, before it is added to the residual stream."""
        x_BTD = dropout(y_BTD, self.dropout, key).astype(dtype)
        h_BTR = gelu(add_bias(matmul(x_BTD, self.w_down[...], dtype), self.b_down[...]))
        return y_BTD + add_bias(matmul(h_BTR, self.w_up[...], jnp.float32), self.b_up[...])


class BlockAdapter(nnx.Module):
    """Adapter parameters of one block; none for a prompt adapter, which only extends the input."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        kind, targets = config.adapter.kind, config.adapter.targets if config.adapter.kind == "lora" else ()
        D, C = config.n_embd, config.head_width
        shapes = {
            "attn/w_qkv": (D, (config.kv_heads, config.n_head // config.kv_heads + 2, C)),
            "attn/w_out": (config.n_head * C, (D,)),
            "mlp/w_in": (D, (config.mlp_size,)),
            "mlp/w_out": (config.mlp_size, (D,)),
        }
        self.attn_w_qkv, self.attn_w_out, self.mlp_w_in, self.mlp_w_out = (
            LowRank(config, *shape, rngs=rngs) if target in targets else None for target, shape in shapes.items()
        )
        self.attn, self.mlp = (Bottleneck(config, rngs=rngs) if kind == "bottleneck" else None for _ in range(2))
        prefix = (config.adapter.tokens, config.kv_heads, C)
        self.k, self.v = (
            nnx.Param(normal(INIT_STD)(rngs.params(), prefix)) if kind == "prefix" else None for _ in range(2)
        )

    @property
    def in_mlp(self) -> bool:
        """Whether a matmul of the MLP has LoRA."""
        return self.mlp_w_in is not None or self.mlp_w_out is not None

    def prefix(self, dtype: jax.typing.DTypeLike) -> "Prefix | None":
        """Learned keys and values of a prefix adapter; None for other adapters."""
        return (
            None if self.k is None or self.v is None else Prefix(self.k[...].astype(dtype), self.v[...].astype(dtype))
        )


class Prompt(nnx.Module):
    """Learned vectors before the token embeddings of every text (prompt tuning, arXiv:2104.08691)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.w = nnx.Param(normal(INIT_STD)(rngs.params(), (config.adapter.tokens, config.n_embd)))


class Prefix(NamedTuple):
    """Keys and values before those of every sequence, `[P, G, C]` each, or of all blocks with a leading layer axis."""

    k: jax.Array
    v: jax.Array


def prefixed_attention(
    q_BTHC: jax.Array, k_BSGC: jax.Array, v_BSGC: jax.Array, mask: Mask, spec: AttentionSpec, prefix: Prefix
) -> jax.Array:
    """Attention in which every query also attends to `prefix`, whatever its segment and the window."""
    T = q_BTHC.shape[1]
    visible_BTS = ~hidden_BTS(spec, mask, T, T)
    k_BGSC, v_BGSC = (x.transpose(0, 2, 1, 3) for x in (k_BSGC, v_BSGC))
    return cached_attention_reference(q_BTHC, *with_prefix(prefix, k_BGSC, v_BGSC, visible_BTS), spec)


def with_prefix(
    prefix: Prefix, k_BGSC: jax.Array, v_BGSC: jax.Array, visible_BTS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Puts `prefix` before keys and values, and marks it visible to all queries."""

    def prepend(first_PGC, x_BGSC):
        P, G, C = first_PGC.shape
        first_BGPC = jnp.broadcast_to(first_PGC.transpose(1, 0, 2)[None], (x_BGSC.shape[0], G, P, C))
        return jnp.concatenate([first_BGPC.astype(x_BGSC.dtype), x_BGSC], axis=2)

    P = prefix.k.shape[0]
    visible = jnp.pad(visible_BTS, ((0, 0), (0, 0), (P, 0)), constant_values=True)
    return prepend(prefix.k, k_BGSC), prepend(prefix.v, v_BGSC), visible


def merge_lora(config: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
    """Returns config and params without adapters; adds `A B alpha / rank` to the weights, in float32 arithmetic."""
    params = dict(params)
    adapters = params.pop("adapters")
    blocks = {part: dict(x) if isinstance(x, dict) else x for part, x in params["blocks"].items()}
    for target in config.adapter.targets:
        part, name = target.split("/")
        low, weight = adapters[f"{part}_{name}"], blocks[part][name]
        a, b = low["a"].astype(jnp.float32), low["b"].astype(jnp.float32)
        update = jnp.einsum("lir,lr...->li...", a, b, precision="highest")
        if target == "mlp/w_out":  # stored with its outputs first
            update = update.transpose(0, 2, 1)
        merged = weight.astype(jnp.float32) + config.adapter.alpha / config.adapter.rank * update
        blocks[part][name] = merged.astype(weight.dtype)
    return dataclasses.replace(config, adapter=AdapterConfig()), params | {"blocks": blocks}
