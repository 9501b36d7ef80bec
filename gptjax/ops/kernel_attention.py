"""Attention on a CPU by the C++ kernel, which reads queries, keys and values from one array.

Shape suffixes: as in `attention_spec.py`; E = H / G + 2: the queries, the key and the value of one key head.
"""

import functools

import jax

from gptjax.ops import kernels
from gptjax.ops.attention_spec import AttentionSpec, Implementation, Request, needs_dense_weights


def _unsupported(request: Request) -> str | None:
    spec = request.spec
    if reason := needs_dense_weights(request):
        return reason
    if request.dropout:
        return "attention weights are dropped"
    if spec.softcap or spec.scale or request.slopes:
        return "logits are scaled, capped or biased in another way than GPT-2's"
    if not request.packed:
        return "queries, keys and values are separate arrays"
    return kernels.unusable(request.dtype, request.queries, request.head_dim)


def kernel_attention(spec: AttentionSpec, qkv_BTGEC: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Returns `[B, T, H, C]`."""
    return _attention(spec.window, qkv_BTGEC, segments_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(window, qkv_BTGEC, segments_BT):
    return kernels.attention(qkv_BTGEC, segments_BT, window)[0]


def _forward(window, qkv_BTGEC, segments_BT):
    y_BTHC, log_sums_BHT = kernels.attention(qkv_BTGEC, segments_BT, window)
    return y_BTHC, (qkv_BTGEC, segments_BT, y_BTHC, log_sums_BHT)


def _backward(window, saved, dy_BTHC):
    qkv_BTGEC, segments_BT, y_BTHC, log_sums_BHT = saved
    return kernels.attention_gradient(qkv_BTGEC, segments_BT, y_BTHC, log_sums_BHT, dy_BTHC, window), None


_attention.defvjp(_forward, _backward)

KERNEL = Implementation("C++ kernel", _unsupported, kernel_attention, takes_packed=True)
