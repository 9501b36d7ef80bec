"""Attention on a CPU with the C++ kernel, which reads queries, keys and values from one array.

Shape suffixes: as in `attention_spec.py`; E = H / G + 2: the queries, the key and the value of one key head.
"""

import functools

import jax

from gptjax.machine.processor import core_count
from gptjax.ops import kernels
from gptjax.ops.attention_spec import AttentionSpec, Implementation, Request, exceeds_fused_kernel

CORES_PER_TASK = 2
"""If there are more cores than this for each task of the kernel, XLA's own attention is used, which keeps all cores
busy."""


def _unsupported(request: Request) -> str | None:
    if reason := exceeds_fused_kernel(request):
        return reason
    if request.spec.scale:
        return "logits are scaled by another factor than 1 / sqrt(head_dim)"
    if not request.packed:
        return "queries, keys and values are separate arrays"
    tasks, cores = request.batch * request.n_kv_head, core_count()
    if cores > CORES_PER_TASK * tasks:  # each pair is one task of the gradient kernel; measured on two cores only
        return f"{tasks} pairs of a sequence and a key head are too few for {cores} cores"
    return kernels.unsupported(request.dtype, request.queries, request.head_dim)


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
