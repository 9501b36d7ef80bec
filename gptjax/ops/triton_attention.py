"""Attention on a GPU with gradients whose bits never change: JAX's Triton kernel, which adds them up in a fixed order.

Shape suffixes: B batch, T query position, S key position, H query heads, G key and value heads, C head_dim.
"""

import jax
import jax.numpy as jnp

ROWS = 128
"""Queries of a block of the forward pass, which T must be a multiple of."""
COLUMNS = 64
"""Keys of a block, and of the backward pass queries too."""
LARGEST_HEAD = 64  # larger ones were not tried on a GPU; a block of them may not fit into its shared memory


def triton_fits(T: int, head_dim: int, window: int, dropout: float, dtype) -> bool:
    """Whether the kernel can do it."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    return half and T % ROWS == 0 and 16 <= head_dim <= LARGEST_HEAD and not window and not dropout


def triton_attention(
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    segments_BT: jax.Array | None,
    _drops: None = None,
    interpret: bool = False,
) -> jax.Array:
    """What `attention` computes, on one GPU; `interpret` runs the kernel anywhere, slowly."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    repeats = q_BTHC.shape[2] // k_BSGC.shape[2]
    k_BSHC, v_BSHC = (x if repeats == 1 else jnp.repeat(x, repeats, axis=2) for x in (k_BSGC, v_BSGC))
    return mha(
        q_BTHC,
        k_BSHC,
        v_BSHC,
        segments_BT,
        sm_scale=q_BTHC.shape[-1] ** -0.5,
        causal=True,
        block_sizes=BlockSizes(ROWS, COLUMNS, *(4 * (COLUMNS,))),
        num_warps=8,
        interpret=interpret,
    )
