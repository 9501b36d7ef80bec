"""Cost of a step: floating-point operations, bytes, and the hardware's published peak."""

from typing import Any

import jax

from gptjax.config.model import ModelConfig
from gptjax.machine.chips import chip_of


def flops_per_token(config: ModelConfig, params: Any) -> float:
    """Model FLOPs of one training token, forward and backward (PaLM, arXiv:2204.02311, appendix B).

    Six per parameter of a matmul, plus attention over the whole context or window. As in PaLM, masked keys are counted.
    """
    keys = sum(config.attended_keys(layer) for layer in range(config.n_layer))
    return 6.0 * matmul_parameters(config, params) + 12.0 * config.n_head * config.head_width * keys


def matmul_parameters(config: ModelConfig, params: Any) -> float:
    """Number of parameters in matmuls per token, including the output projection; embedding lookups are no matmuls."""
    leaves = jax.tree_util.tree_leaves_with_path(params["blocks"])
    multiplied = sum(leaf.size for path, leaf in leaves if path[-1].key.startswith("w_"))
    if config.n_expert:  # a token uses only some experts
        idle = 1.0 - config.experts_per_token / config.n_expert
        multiplied -= idle * sum(leaf.size for path, leaf in leaves if path[-1].key.startswith("w_") and leaf.ndim == 4)
    return multiplied + config.n_embd * config.vocab_size


def peak_flops() -> float | None:
    """Published bfloat16 peak of all devices together, FLOP/s; None if unknown, as for CPUs."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else chip.peak_flops * jax.device_count()


def parameter_count(params: Any) -> int:
    """Number of elements in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def readable_bytes(count: float) -> str:
    """`1.5 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def readable_count(count: float) -> str:
    """`124 M`."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g} B"


def readable_number(value: float) -> str:
    """`1,234`, or three digits of a number below 1,000."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def readable_time(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
