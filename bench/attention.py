"""Milliseconds of one attention layer, forward and backward: by kernels, by XLA, by XLA with its products apart from
the softmax as XLA takes them otherwise, and PyTorch's `scaled_dot_product_attention`. Ours begins and ends with the
queries, keys and values in one array, as a model has them. Each in a process of its own, in turn."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from gptjax.machine.allocator import HUGE_PAGES, TUNABLES
from gptjax.machine.native.compiler import SWITCH

SHAPES = ((16, 256, 6, 64), (4, 512, 12, 64), (16, 1024, 6, 64), (1, 4096, 6, 64))  # B, T, H, C
DTYPES = ("bfloat16", "float32")
ROUNDS, REPEATS = 2, 6


def main() -> None:
    sides = {"kernels": gptjax, "XLA": gptjax, "apart": apart, "PyTorch": pytorch}
    if sys.argv[1:]:
        print(json.dumps(sides[sys.argv[1]]()))
        return
    found = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side in sides:
            environment = {**os.environ, TUNABLES: HUGE_PAGES, SWITCH: "auto" if side == "kernels" else "0"}
            call = subprocess.run(
                [sys.executable, __file__, side], env=environment, capture_output=True, text=True, check=True
            )
            found[side].append(json.loads(call.stdout.splitlines()[-1]))
    print("| B, T, H, C | dtype | " + " | ".join(sides) + " |")
    print("|---|---|" + "---|" * len(sides))
    for row, (shape, dtype) in enumerate((shape, dtype) for shape in SHAPES for dtype in DTYPES):
        times = (min(times[row] for times in found[side]) for side in sides)
        print(f"| {', '.join(map(str, shape))} | {dtype} | " + " | ".join(f"{1e3 * t:.1f}" for t in times) + " |")


def median(call: Callable[[], object]) -> float:
    """Seconds, without the first call."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def gptjax() -> list[float]:
    import jax

    from gptjax.machine.compile_cache import start
    from gptjax.ops.attention import self_attention
    from gptjax.ops.attention_spec import CAUSAL

    start()
    times = []
    for B, T, H, C in SHAPES:
        for dtype in DTYPES:
            one, two = jax.random.split(jax.random.key(0))
            qkv, dy = jax.random.normal(one, (B, T, H, 3, C), dtype), jax.random.normal(two, (B, T, H, C), dtype)

            @jax.jit
            def step(qkv, dy):
                y, pull = jax.vjp(lambda qkv: self_attention(CAUSAL, qkv), qkv)
                return y, pull(dy)

            times.append(median(lambda: jax.block_until_ready(step(qkv, dy))))  # noqa: B023
    return times


def apart() -> list[float]:
    from gptjax.ops import blocked_attention

    blocked_attention.FUSED_ROWS = sys.maxsize
    return gptjax()


def pytorch() -> list[float]:
    import torch

    times = []
    for B, T, H, C in SHAPES:
        for dtype in DTYPES:
            torch.manual_seed(0)
            q, k, v = (torch.randn(B, H, T, C, dtype=getattr(torch, dtype)).requires_grad_() for _ in range(3))
            dy = torch.randn(B, H, T, C, dtype=q.dtype)

            def step():
                y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: B023
                y.backward(dy)  # noqa: B023

            times.append(median(step))
    return times


if __name__ == "__main__":
    main()
