"""What the machine can do at most: large matrix products, by the faster of PyTorch and XLA, and reading memory.

Prints JSON: FLOP/s by dtype, bytes per second.
"""

import json
import time

import jax
import jax.numpy as jnp
import torch

SHAPES = ((2048, 2048, 2048), (4096, 384, 1536), (2048, 768, 3072))  # large, and those of the models
REPEATS = 8


def best(function) -> float:
    """Seconds of the fastest of several calls."""
    function()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    peaks = {}
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    for dtype in ("float32", "bfloat16"):
        peaks[dtype] = 0.0
        for n, k, m in SHAPES:
            a, b = (torch.randn(shape).to(getattr(torch, dtype)) for shape in ((n, k), (k, m)))
            c, d = (jnp.asarray(x.float().numpy()).astype(dtype) for x in (a, b))
            fastest = min(best(lambda a=a, b=b: a @ b), best(lambda c=c, d=d: product(c, d).block_until_ready()))
            peaks[dtype] = max(peaks[dtype], 2 * n * k * m / fastest)
    x = torch.ones(2**28)
    peaks["bandwidth"] = x.nbytes / best(x.sum)
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
