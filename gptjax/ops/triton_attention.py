"""Attention on a GPU with deterministic gradients: JAX's Triton kernel, which sums them in a fixed order.

JAX will remove this kernel in favour of the package tokamax. It is kept because no other implementation here has
deterministic gradients at its speed (docs/experiments/gpu.md), and tokamax was not measured yet.

Shape suffixes: B batch, T query position, S key position, H query heads, G key and value heads, C head_dim.
"""

import jax
import jax.numpy as jnp

from gptjax.ops.attention_heads import AttentionInputs
from gptjax.ops.attention_spec import AttentionSpec, Implementation, Request, exceeds_fused_kernel
from gptjax.ops.scheduling import deterministic_ops_requested

ROWS = 128
"""Queries in a block of the forward pass; T must be a multiple of it."""
COLUMNS = 64
"""Keys in a block; in the backward pass also queries."""
LARGEST_HEAD = 64  # larger heads are untested; their blocks may not fit into the GPU's shared memory


def _unsupported(request: Request) -> str | None:
    if request.platform != "gpu" or not deterministic_ops_requested():
        return "is for a GPU whose XLA_FLAGS ask for deterministic operations"
    if reason := exceeds_fused_kernel(request):
        return reason
    if request.spec.window:
        return "attention has a window"
    if request.dtype not in ("bfloat16", "float16"):
        return f"{request.dtype} is neither bfloat16 nor float16"
    if request.queries % ROWS or not 16 <= request.head_dim <= LARGEST_HEAD:
        return f"needs a multiple of {ROWS} positions and heads of 16 to {LARGEST_HEAD}"
    return None


def triton_attention(spec: AttentionSpec, inputs: AttentionInputs, interpret: bool = False) -> jax.Array:
    """Returns `[B, T, H, C]`; `interpret` runs the kernel on any platform, slowly."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    q_BTHC, k_BSGC, v_BSGC, mask, *_ = inputs
    repeats = q_BTHC.shape[2] // k_BSGC.shape[2]
    k_BSHC, v_BSHC = (x if repeats == 1 else jnp.repeat(x, repeats, axis=2) for x in (k_BSGC, v_BSGC))
    return mha(
        q_BTHC,
        k_BSHC,
        v_BSHC,
        mask.segments_BT,
        sm_scale=spec.logit_scale(q_BTHC.shape[-1]),
        causal=True,
        block_sizes=BlockSizes(ROWS, COLUMNS, *(4 * (COLUMNS,))),
        num_warps=8,
        interpret=interpret,
    )


TRITON = Implementation("Triton", _unsupported, triton_attention)
