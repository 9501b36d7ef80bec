"""What a step costs: floating-point operations, bytes, and the hardware's published limits."""

from typing import Any

import jax

from gptjax.config import ModelConfig

# Dense bfloat16 peak, FLOP/s, from the vendors' data sheets; matched as a part of `device.device_kind`.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def flops_per_token(config: ModelConfig, params: Any) -> float:
    """Model FLOPs of one training token, forward and backward (PaLM, arXiv:2204.02311, appendix B).

    Six per parameter that is multiplied (embedding lookups are not), and the attention products over all visible keys.
    """
    multiplied = sum(leaf.size for leaf in jax.tree.leaves(params["blocks"]))
    multiplied += config.n_embd * config.vocab_size
    return 6.0 * multiplied + 12.0 * config.n_layer * config.n_embd * (config.attention_window or config.block_size)


def peak_flops() -> float | None:
    """Published bfloat16 peak of all devices together, FLOP/s; None where it is not known, as for CPUs."""
    kind = jax.devices()[0].device_kind
    return next((peak * jax.device_count() for name, peak in PEAK_FLOPS.items() if name in kind), None)


def parameter_count(params: Any) -> int:
    """Numbers in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def readable_bytes(count: float) -> str:
    """`1.5 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def readable_count(count: float) -> str:
    """`124 M`."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g} B"


def readable_time(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
