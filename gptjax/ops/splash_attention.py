"""Attention on a TPU: JAX's splash kernel, which never holds all weights and skips blocks that are masked entirely.

Shape suffixes: B batch, T query position, S key position, H query heads, G key and value heads, C head_dim.
"""

import jax

from gptjax.ops.attention_heads import AttentionInputs
from gptjax.ops.attention_spec import AttentionSpec, Implementation, Request, exceeds_fused_kernel

LANES = 128  # the kernel's block sizes are multiples of it
LARGEST_BLOCK = 512


def _unsupported(request: Request) -> str | None:
    if request.platform != "tpu":
        return "needs a TPU"
    if reason := exceeds_fused_kernel(request):
        return reason
    if request.queries % LANES:
        return f"{request.queries} positions are no multiple of {LANES}"
    return None


def splash_attention(spec: AttentionSpec, inputs: AttentionInputs, interpret: bool = False) -> jax.Array:
    """Returns `[B, T, H, C]`; `interpret` runs the kernel on any platform, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q_BTHC, k_BSGC, v_BSGC, mask, *_ = inputs
    T, H, C = q_BTHC.shape[1:]
    visible = masks.LocalMask((T, T), (spec.window - 1, 0), 0) if spec.window else masks.CausalMask((T, T))
    block = next(size for size in (LARGEST_BLOCK, 256, LANES) if T % size == 0)
    sizes = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        **dict.fromkeys(("block_q_dq", "block_kv_dq"), block),
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([visible] * H), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def one_sequence(q_THC, k_SGC, v_SGC, segments_T):
        ids = None if segments_T is None else splash.SegmentIds(segments_T, segments_T)
        heads_first = (x.swapaxes(0, 1) for x in (q_THC * spec.logit_scale(C), k_SGC, v_SGC))
        return jax.numpy.swapaxes(kernel(*heads_first, segment_ids=ids), 0, 1)  # pyright: ignore[reportArgumentType]

    axes = (0, 0, 0, None if mask.segments_BT is None else 0)
    return jax.vmap(one_sequence, in_axes=axes)(q_BTHC, k_BSGC, v_BSGC, mask.segments_BT)


SPLASH = Implementation("splash", _unsupported, splash_attention)
