"""Cross-attention of a decoder to the encoder's hidden states of the source (arXiv:1706.03762, section 3.2.3).

Shape suffixes: B batch, T position of the target, S position of the source, D n_embd, H query heads, G key and value
heads, C head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config.model import ModelConfig
from gptjax.model.inputs import Memory, MemoryHeads
from gptjax.model.parameters import linear, output_init, weight_init, zeros
from gptjax.ops.attention import attention
from gptjax.ops.attention_spec import AttentionSpec, Mask


class CrossAttention(nnx.Module):
    """Queries come from the target, keys and values from the source. Positions are not used."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, H, G, C = config.n_embd, config.n_head, config.kv_heads, config.head_width
        self.w_q = nnx.Param(weight_init(config)(rngs.params(), (D, H, C)))
        self.w_kv = nnx.Param(weight_init(config)(rngs.params(), (D, G, 2, C)))
        self.w_out = nnx.Param(output_init(config)(rngs.params(), (H * C, D)))
        self.b_q = zeros(H, C) if config.bias or config.qkv_bias else None
        self.b_kv = zeros(G, 2, C) if config.bias or config.qkv_bias else None
        self.b_out = zeros(D) if config.bias else None
        self.spec = AttentionSpec(causal=False, scale=config.attention_scale, dropout=config.dropout)

    def __call__(
        self, x_BTD: jax.Array, memory: Memory, key: jax.Array | None = None, residual: jax.Array | None = None
    ) -> jax.Array:
        """Returns the float32 output of the layer, plus `residual` if it is given."""
        q_BTHC = linear(x_BTD, self.w_q, self.b_q, x_BTD.dtype)
        heads = memory.heads or self.heads(memory.states_BSD)
        k_BSGC, v_BSGC = (x.astype(x_BTD.dtype) for x in heads)
        y_BTHC = attention(q_BTHC, k_BSGC, v_BSGC, self.spec, Mask(keys_BS=memory.keys_BS), key=key)
        return linear(y_BTHC.reshape(*x_BTD.shape[:2], -1), self.w_out, self.b_out, jnp.float32, residual=residual)

    def heads(self, states_BSD: jax.Array | None) -> MemoryHeads:
        """Keys and values of the source. Decoding computes them once."""
        assert states_BSD is not None  # a memory without heads has states
        kv_BSG2C = linear(states_BSD, self.w_kv, self.b_kv, states_BSD.dtype)
        return MemoryHeads(kv_BSG2C[:, :, :, 0], kv_BSG2C[:, :, :, 1])
