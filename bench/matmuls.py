"""Times XLA's matmuls of a few rows with a 768 x 3072 matrix, in microseconds, by dtype and operand layout. With the
argument `one_row` it times a single row with the matrices of the 124 M model, by XLA's library and in stripes, inside a
loop over tokens.

`ops/projection.py` chooses by these tables (docs/experiments/decoding.md). Each call multiplies by many matrices in
turn, so that none stays in a cache.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.machine.allocator import restart
from gptjax.ops.matmul import row_major
from gptjax.ops.single_row import single_row_matmul, to_stripes

K, F, MATRICES, ROUNDS = 768, 3072, 24, 9
LAYOUTS = {
    "nk,kf->nf": lambda x, w, out: jnp.einsum("nk,kf->nf", x, w, preferred_element_type=out),
    "nk,fk->nf": lambda x, w, out: jnp.einsum("nk,fk->nf", x, w, preferred_element_type=out),
    "fk,nk->fn": lambda x, w, out: row_major(jnp.einsum("fk,nk->fn", w, x, preferred_element_type=out)).T,
}
SUMS = {"float32": jnp.float32, "bfloat16": jnp.float32, "int8": jnp.int32}
SHAPES = ((768, 3072), (3072, 768), (768, 768), (768, 2304), (768, 50257))
TOKENS = 4


def microseconds(layout: str, dtype: str, rows: int) -> float:
    random = np.random.default_rng(0)
    shape = (K, F) if layout == "nk,kf->nf" else (F, K)
    matrices = [jnp.asarray(random.normal(0, 30, shape), dtype) for _ in range(MATRICES)]
    x_NK = jnp.asarray(random.normal(0, 30, (rows, K)), dtype)
    multiply_all = jax.jit(lambda x, matrices: [LAYOUTS[layout](x, w, SUMS[dtype]) + 1 for w in matrices])
    times = []
    for _ in range(ROUNDS + 1):  # the first one compiles
        started = time.perf_counter()
        jax.block_until_ready(multiply_all(x_NK, matrices))
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times[1:]) / MATRICES


def one_row() -> None:
    print("| matrix | dtype | library | stripes |")
    print("|---|---|---|---|")
    for shape in SHAPES:
        for dtype in SUMS:
            times = (one_row_microseconds(matmul, shape, dtype) for matmul in (library, single_row_matmul))
            print(f"| {shape[0]}x{shape[1]} | {dtype} | {' | '.join(f'{t:,.0f}' for t in times)} |", flush=True)


def library(x_K, w_FK):
    """Multiplies one row in float32; in other dtypes two, because the library is several times slower with one."""
    rows = 1 if w_FK.dtype == jnp.float32 else 2
    x_NK = jnp.tile(x_K[None], (rows, 1)).astype(w_FK.dtype)
    return jnp.einsum("nk,fk->nf", x_NK, w_FK, preferred_element_type=SUMS[w_FK.dtype.name])[0].astype(jnp.float32)


def one_row_microseconds(matmul, shape: tuple[int, int], dtype: str) -> float:
    random, (K, F) = np.random.default_rng(0), shape
    count = 2 if F > 50000 else MATRICES
    laid_out = to_stripes if matmul is single_row_matmul else jnp.transpose
    matrices = [laid_out(jnp.asarray(random.normal(0, 30, shape), dtype)) for _ in range(count)]

    @jax.jit
    def tokens(x_K, matrices):
        def token(_, y_F):
            for w in matrices:
                y_F = y_F + matmul(x_K + 0 * y_F[0], w)
            return y_F

        return jax.lax.fori_loop(0, TOKENS, token, jnp.zeros(F))

    x_K = jnp.asarray(random.normal(0, 1, K), jnp.float32)
    times = []
    for _ in range(ROUNDS + 1):  # the first one compiles
        started = time.perf_counter()
        jax.block_until_ready(tokens(x_K, matrices))
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times[1:]) / count / TOKENS


def main() -> None:
    if sys.argv[1:] == ["one_row"]:
        restart()
        return one_row()
    print("| rows | dtype | " + " | ".join(LAYOUTS) + " |")
    print("|---|---|" + "---|" * len(LAYOUTS))
    for dtype in SUMS:
        for rows in (1, 2, 4, 8, 16, 32, 128):
            times = " | ".join(f"{microseconds(layout, dtype, rows):,.0f}" for layout in LAYOUTS)
            print(f"| {rows} | {dtype} | {times} |", flush=True)


if __name__ == "__main__":
    main()
