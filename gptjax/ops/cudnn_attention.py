"""Attention on a GPU by cuDNN's fused kernel."""

import functools

import jax
import jax.numpy as jnp

from gptjax.ops.attention_heads import AttentionInputs
from gptjax.ops.attention_spec import AttentionSpec, Implementation, Mask, Request, exceeds_fused_kernel
from gptjax.ops.scheduling import deterministic_ops_requested


def _unsupported(request: Request) -> str | None:
    if request.platform != "gpu":
        return "needs a GPU"
    if deterministic_ops_requested():
        return "its gradients are not deterministic, and XLA_FLAGS ask for deterministic operations"
    if reason := exceeds_fused_kernel(request):
        return reason
    if request.dtype not in ("bfloat16", "float16"):
        return f"{request.dtype} is neither bfloat16 nor float16"
    if not cudnn_works(request.dtype, request.queries, request.head_dim, request.spec.window, request.segments):
        return "a trial call of cuDNN failed"
    return None


@functools.cache
def cudnn_works(dtype: str, T: int, head_dim: int, window: int, masked: bool) -> bool:
    """Whether cuDNN's attention runs on this GPU, forward and backward; found by a trial call.

    The trial runs outside of the trace of the step that is being compiled.
    """
    try:
        with jax.ensure_compile_time_eval():
            x = jnp.ones((1, T, 1, head_dim), dtype)
            mask = Mask(jnp.zeros((1, T), jnp.int32) if masked else None)
            spec = AttentionSpec(window=window)
            y, derivative = jax.vjp(lambda x: cudnn_attention(spec, AttentionInputs(x, x, x, mask)), x)
            finite = jnp.isfinite(y) & jnp.isfinite(derivative(y)[0])
            return bool(jnp.all(finite))
    except Exception as error:  # training can continue without cuDNN, whatever the error
        print(f"cuDNN attention is not available ({str(error).splitlines()[0]}); using another implementation")
        return False


def cudnn_attention(spec: AttentionSpec, inputs: AttentionInputs) -> jax.Array:
    """Returns `[B, T, H, C]`."""
    q_BTHC, k_BSGC, v_BSGC, mask, *_ = inputs
    segments_BT = mask.segments_BT
    same = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BSGC,
        v_BSGC,
        mask=same,
        scale=spec.scale or None,
        is_causal=True,
        local_window_size=(spec.window - 1, 0) if spec.window else None,
        implementation="cudnn",
    )


CUDNN = Implementation("cuDNN", _unsupported, cudnn_attention)
