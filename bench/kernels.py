"""Times each C++ kernel (`gptjax/machine/native`) of a layer, and of the loss, at the sizes of the bench's models:
milliseconds (the median of 30 calls), and TFLOP/s of matmuls. "+1 matmul": the backward pass recomputes one."""

import statistics
import time
from collections.abc import Callable, Iterator

from work import TRAINING

from gptjax.machine.allocator import restart
from gptjax.machine.compile_cache import start

CALLS = 30
DTYPES = ("bfloat16", "float32")


def main() -> None:
    restart()
    start()
    from gptjax.machine.native import build

    if not build.ready():
        raise SystemExit(f"no kernels: {build.state()}")
    print(f"kernels: {build.state()}")
    print("| model | kernel | " + " | ".join(f"{dtype}, ms | TFLOP/s" for dtype in DTYPES) + " |")
    print("|---|---|" + "---|---|" * len(DTYPES))
    for name in ("small", "medium", "124m"):
        found = [list(kernels_of(name, dtype)) for dtype in DTYPES]
        for row in zip(*found, strict=True):
            cells = (f"{ms:.2f} | {flops / ms / 1e9:.2f}" if flops else f"{ms:.2f} |" for _, flops, ms in row)
            print(f"| {name} | {row[0][0]} | {' | '.join(cells)} |", flush=True)


def kernels_of(name: str, dtype: str) -> Iterator[tuple[str, float, float]]:
    """Name, floating-point operations (0: it is no matmul) and milliseconds of each kernel."""
    import jax
    import jax.numpy as jnp

    from gptjax.ops import kernels

    work = TRAINING[name]
    B, T, D, H, V = work.batch_size, work.block_size, work.n_embd, work.n_head, work.vocab_size
    N, F, C = B * T, 4 * D, D // H

    def draw(*shape: int, dtype: str = dtype) -> jax.Array:
        return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)

    x, x_out, qkv = draw(N, D), draw(N, 3 * D), draw(B, T, H, 3, C)
    w_qkv, w, b, stream = (draw(*shape, dtype="float32") for shape in ((D, 3 * D), (D, F), (D,), (N, D)))
    matmul, mlp = 2 * N * D * 3 * D, 4 * N * D * F
    pairs = B * H * T * (T + 1) // 2 * C * 2  # of one matmul of attention
    yield "linear, D to 3 D", matmul, milliseconds(lambda x, w: kernels.linear(x, w, None, dtype, False), x, w_qkv)
    yield "its gradient of x", matmul, milliseconds(lambda y, w: kernels.linear(y, w, None, dtype, True), x_out, w_qkv)
    yield "its gradient of w", matmul, milliseconds(kernels.weight_gradient, x, x_out)
    yield "MLP", mlp, milliseconds(lambda x, w: kernels.mlp(x, w, None, w, None), x, w)
    gradient = milliseconds(lambda x, w: kernels.mlp_gradient(x, w, None, w, x), x, w)
    yield "its gradients, +1 matmul", 2.5 * mlp, gradient
    yield "attention", 2 * pairs, milliseconds(lambda qkv: kernels.attention(qkv, None, 0), qkv)
    y, logs = kernels.attention(qkv, None, 0)
    gradient = milliseconds(lambda qkv, y, logs: kernels.attention_gradient(qkv, None, y, logs, y, 0), qkv, y, logs)
    yield "its gradient, +1 matmul", 5 * pairs, gradient
    yield "norm", 0, milliseconds(lambda x: kernels.layer_norm(x, b, b, 1e-5, dtype), stream)
    gradient = milliseconds(lambda x, dy: kernels.layer_norm_gradient(x, b, dy, x, 1e-5), stream, x)
    yield "its gradient, with the residual stream's", 0, gradient
    if V >= 1024:
        w_VD, targets = draw(V, D, dtype="float32"), jnp.zeros(N, "int32")
        loss = milliseconds(lambda x, w: kernels.cross_entropy_gradient(x, w, targets, V, 0.0, 0.0), x, w_VD)
        yield "loss and its gradients, logits computed twice", 8 * N * D * V, loss


def milliseconds(call: Callable, *args) -> float:
    import jax

    run = jax.jit(call)
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
