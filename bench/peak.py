"""Measures the machine's peak rates: large matmuls, by the faster of PyTorch and XLA, and memory bandwidth.

Prints JSON: FLOP/s by dtype, bytes per second, and the name of the GPU where there is one.
"""

import json
import time

import jax
import jax.numpy as jnp
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((2048, 2048, 2048), (4096, 384, 1536), (2048, 768, 3072))  # large, and those of the models
GPU_SHAPES = ((8192, 8192, 8192), (32768, 768, 3072))
REPEATS = 8


def best(function) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def main() -> None:
    peaks = {}
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as XLA multiplies there
    for dtype in ("float32", "bfloat16"):
        peaks[dtype] = 0.0
        for n, k, m in GPU_SHAPES if DEVICE == "cuda" else SHAPES:
            a, b = (torch.randn(shape, device=DEVICE).to(getattr(torch, dtype)) for shape in ((n, k), (k, m)))
            c, d = (jnp.asarray(x.float().cpu().numpy()).astype(dtype) for x in (a, b))
            fastest = min(best(lambda a=a, b=b: a @ b), best(lambda c=c, d=d: product(c, d).block_until_ready()))
            peaks[dtype] = max(peaks[dtype], 2 * n * k * m / fastest)
    x = torch.ones(2**28, device=DEVICE)
    peaks["bandwidth"] = x.nbytes / best(x.sum)
    if DEVICE == "cuda":
        peaks["gpu"] = torch.cuda.get_device_name()
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
