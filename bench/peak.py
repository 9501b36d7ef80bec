"""What the machine can do at most: PyTorch's matrix products on large operands, and reading memory; prints JSON."""

import json
import time

import torch

SIZE, REPEATS = 2048, 8


def best(function) -> float:
    function()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        peaks[str(dtype).removeprefix("torch.")] = 2 * SIZE**3 / best(lambda a=a, b=b: a @ b)
    x = torch.ones(2**28)
    peaks["bandwidth"] = x.nbytes / best(x.sum)
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
