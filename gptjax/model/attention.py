"""Self-attention of a block, in training, prefill and cached decoding.

Shape suffixes: B batch, T position, S key slot, D n_embd, H query heads, G key and value heads, C head width,
E = H / G + 2: the queries, the key and the value of one key head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.model import ModelConfig
from gptjax.machine.platform import target_platform
from gptjax.model import cache as kv
from gptjax.model.adapters import BlockAdapter, LowRank, Prefix, prefixed_attention, with_prefix
from gptjax.model.cache import LayerCache
from gptjax.model.inputs import BlockInputs
from gptjax.model.norms import NORMS, Norm
from gptjax.model.parameters import linear, output_init, value, weight_init, zeros
from gptjax.model.positions import POSITIONS
from gptjax.ops.attention import FirstTokens, cached_attention, explain, self_attention, split_heads
from gptjax.ops.attention_spec import AttentionSpec, Bias, Request


def attention_spec(config: ModelConfig, kind: str) -> AttentionSpec:
    """The `AttentionSpec` of layers of one kind, see `ModelConfig.layer_kind`."""
    return AttentionSpec(
        causal=not config.bidirectional,
        window=config.attention_window if kind == "local" else 0,
        sinks=config.attention_sinks if kind == "local" else 0,
        stride=config.attention_stride if kind in ("strided", "fixed") else 0,
        summary=config.attention_summary if kind == "fixed" else 0,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        dropout=config.dropout,
    )


def explain_attention(
    config: ModelConfig, batch: int, dtype: jax.typing.DTypeLike, segments: bool, rate: bool, ahead: bool = False
) -> str:
    """Names the attention implementation for each kind of layer, and why faster ones cannot be used.

    Args:
        config: Shape of the model.
        batch: Sequences in a micro-batch.
        dtype: Of matmul operands.
        segments: Whether a window can contain several documents.
        rate: Whether dropout is on.
        ahead: Whether earlier tokens can attend to some later ones (prefix LM).
    """
    B, T, C = batch, config.block_size, config.head_width
    bias = POSITIONS[config.positions].bias
    found = {}
    for kind in sorted({config.layer_kind(layer) for layer in range(config.n_layer)}):
        request = Request(
            spec=attention_spec(config, kind),
            batch=B,
            queries=T,
            keys=T,
            n_head=config.n_head,
            n_kv_head=config.kv_heads,
            head_dim=C,
            dtype=jnp.dtype(dtype).name,
            platform=target_platform(),
            packed=True,
            segments=segments,
            ahead=ahead,
            bias=POSITIONS[config.positions].layer_table is not None,
            slopes=bias is not None and POSITIONS[config.positions].layer_table is None,
            dropout=rate and config.dropout > 0,
        )
        found[kind] = explain(request)
    if config.adapter.kind in ("prompt", "prefix"):
        return f"plain (a {config.adapter.kind} adapter adds keys)"
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return "; ".join(f"{kind} layers {text}" for kind, text in found.items())


class Attention(nnx.Module):
    """Multi-head self-attention. Weights of one key head and its query heads are adjacent, so they shard together."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, H, G, C = config.n_embd, config.n_head, config.kv_heads, config.head_width
        E = H // G + 2
        self.w_qkv = nnx.Param(weight_init(config)(rngs.params(), (D, G, E, C)))
        self.w_out = nnx.Param(output_init(config)(rngs.params(), (H * C, D)))
        self.b_qkv = zeros(G, E, C) if config.bias or config.qkv_bias else None
        self.b_out = zeros(D) if config.bias else None
        together = config.qk_norm == "all"
        norm = NORMS[config.norm]
        self.norm_q = None if config.qk_norm == "none" else norm(config, H * C if together else C)
        self.norm_k = None if config.qk_norm == "none" else norm(config, G * C if together else C)
        method = POSITIONS[config.positions]
        self.distances = None if method.layer_table is None else zeros(*method.layer_table(config))
        self.value_mix = nnx.Param(jnp.array([0.5, 0.5])) if config.value_residual else None
        self.config, self.shape_GEC = config, (G, E, C)

    def __call__(
        self,
        x_BTD: jax.Array,
        inputs: BlockInputs,
        kind: str,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
        adapter: BlockAdapter | None = None,
        prefix: Prefix | None = None,
        residual: jax.Array | None = None,
        first_values: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Returns the float32 output of the layer, plus `residual` if it is given; the new cache; and with
        `model.value_residual` the values of the first layer, which this one is if `first_values` is None.

        With a cache, the tokens follow those in it; without one, `x_BTD` holds whole sequences.
        """
        spec = attention_spec(self.config, kind)
        keys = (None, None) if adapter is None or key is None else jax.random.split(jax.random.fold_in(key, 1))
        projected_BTGEC = self._projected(x_BTD, adapter and adapter.attn_w_qkv, keys[0])
        if self.value_mix is not None:
            projected_BTGEC, first_values = self._with_first_values(projected_BTGEC, first_values)
        qkv_BTGEC = self._rotated(projected_BTGEC, inputs.positions_BT, kind)
        mask = inputs.mask._replace(positions_BT=inputs.positions_BT) if spec.sparse else inputs.mask
        if (slots := inputs.slots) is not None:
            q_BTHC, k_BTGC, v_BTGC = split_heads(qkv_BTGEC)
            assert cache is not None  # `extend` sets the slots of a cache
            cache = kv.write(cache, slots, self.config.attention_sinks, k_BTGC, v_BTGC)
            k_BGSC, v_BGSC, visible_BTS, first = *cache, slots.visible_BTS, None
            if prefix is not None:
                k_BGSC, v_BGSC, visible_BTS = with_prefix(prefix, k_BGSC, v_BGSC, visible_BTS)
            elif slots.capped_BT is not None and self._rotation(kind) is not None:
                q_capped_BTHC, *_ = split_heads(self._rotated(projected_BTGEC, slots.capped_BT, kind))
                first = FirstTokens(q_capped_BTHC, self.config.attention_sinks)
            bias = self._bias(max(k_BGSC.shape[2], self.config.block_size))
            y_BTHC = cached_attention(q_BTHC, k_BGSC, v_BGSC, visible_BTS, spec, bias, slots.distance_NTS, first)
        elif prefix is None:
            y_BTHC = self_attention(spec, qkv_BTGEC, mask, self._bias(x_BTD.shape[1]), key)
        else:
            y_BTHC = prefixed_attention(*split_heads(qkv_BTGEC), mask, spec, prefix)
        return self._out(y_BTHC, adapter and adapter.attn_w_out, keys[1], residual), cache, first_values

    def qkv(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        kind: str,
        low_rank: LowRank | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Queries, keys and values `[B, T, G, E, C]`, after QK norm and rotary embedding if the config has them."""
        return self._rotated(self._projected(x_BTD, low_rank, key), positions_BT, kind)

    def _projected(self, x_BTD: jax.Array, low_rank: LowRank | None, key: jax.Array | None) -> jax.Array:
        qkv_BTGEC = linear(x_BTD, self.w_qkv, self.b_qkv, x_BTD.dtype).reshape(*x_BTD.shape[:-1], *self.shape_GEC)
        return qkv_BTGEC if low_rank is None else qkv_BTGEC + low_rank(x_BTD, key, x_BTD.dtype)

    def _with_first_values(self, qkv_BTGEC: jax.Array, first_values: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Queries, keys and values with those of the first layer mixed in, and these."""
        assert self.value_mix is not None
        own, mix = qkv_BTGEC[:, :, :, -1:], self.value_mix[...].astype(qkv_BTGEC.dtype)
        first_values = own if first_values is None else first_values
        values = mix[0] * own + mix[1] * first_values
        return jnp.concatenate([qkv_BTGEC[:, :, :, :-1], values], axis=3), first_values

    def _rotation(self, kind: str):
        return None if kind == "full_nope" else POSITIONS[self.config.positions].rotate

    def _rotated(self, qkv_BTGEC: jax.Array, positions_BT: jax.Array, kind: str) -> jax.Array:
        """Normed and rotated queries and keys."""
        rotate = self._rotation(kind)
        if self.norm_q is None and rotate is None:
            return qkv_BTGEC
        q_BTGRC, k_BTGC, v_BTG1C = jnp.split(qkv_BTGEC, (self.shape_GEC[1] - 2, self.shape_GEC[1] - 1), axis=3)
        q_BTGRC, k_BTGC = self._normed(q_BTGRC, self.norm_q), self._normed(k_BTGC, self.norm_k)
        if rotate is not None:
            q_BTGRC, k_BTGC = (rotate(self.config, x, positions_BT, kind) for x in (q_BTGRC, k_BTGC))
        return jnp.concatenate([q_BTGRC, k_BTGC, v_BTG1C], axis=3)

    def _normed(self, heads: jax.Array, norm: Norm | None) -> jax.Array:
        if norm is None:
            return heads
        if self.config.qk_norm == "head":
            return norm(heads, heads.dtype)
        return norm(heads.reshape(*heads.shape[:2], -1), heads.dtype).reshape(heads.shape)

    def _bias(self, keys: int) -> Bias | None:
        bias = POSITIONS[self.config.positions].bias
        return None if bias is None else bias(self.config, value(self.distances), keys)

    def _out(
        self, y_BTHC: jax.Array, low_rank: LowRank | None, key: jax.Array | None, residual: jax.Array | None
    ) -> jax.Array:
        B, T, H, C = y_BTHC.shape
        y_BTK = y_BTHC.reshape(B, T, H * C)
        y_BTD = linear(y_BTK, self.w_out, self.b_out, jnp.float32, residual=residual)
        return y_BTD if low_rank is None else y_BTD + low_rank(y_BTK, key, jnp.float32)
