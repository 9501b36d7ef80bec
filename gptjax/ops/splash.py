"""Attention on a TPU: JAX's splash kernel, which never holds all weights and skips blocks that no query sees.

Shape suffixes: B batch, T query position, S key position, H query heads, G key and value heads, C head_dim.
"""

import jax

LANES = 128  # what the kernel's blocks are multiples of
LARGEST_BLOCK = 512


def splash_fits(length: int, dropout: float) -> bool:
    """Whether the kernel can do it: whole blocks only, and no dropout."""
    return length % LANES == 0 and not dropout


def splash_attention(
    window: int,
    q_BTHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    segments_BT: jax.Array | None,
    _drops: None = None,
    interpret: bool = False,
) -> jax.Array:
    """What `attention` computes, on one device of a TPU; `interpret` runs the kernel anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H, C = q_BTHC.shape[1:]
    mask = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    block = next(size for size in (LARGEST_BLOCK, 256, LANES) if T % size == 0)
    sizes = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        **dict.fromkeys(("block_q_dq", "block_kv_dq"), block),
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * H), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def one_row(q_THC, k_SGC, v_SGC, segments_T):
        ids = None if segments_T is None else splash.SegmentIds(segments_T, segments_T)
        heads_first = (x.swapaxes(0, 1) for x in (q_THC * C**-0.5, k_SGC, v_SGC))
        return jax.numpy.swapaxes(kernel(*heads_first, segment_ids=ids), 0, 1)  # pyright: ignore[reportArgumentType]

    axes = (0, 0, 0, None if segments_BT is None else 0)
    return jax.vmap(one_row, in_axes=axes)(q_BTHC, k_BSGC, v_BSGC, segments_BT)
