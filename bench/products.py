"""Microseconds that XLA takes for a product of a few rows with a 768 x 3072 matrix, by dtype and form.

It is the table of docs/performance.md by which `ops/projection.py` chooses. Each call takes 24 matrices in turn, so
that none is in a cache.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.ops.matmul import row_major

K, F, MATRICES, ROUNDS = 768, 3072, 24, 9
FORMS = {
    "nk,kf->nf": lambda x, w, out: jnp.einsum("nk,kf->nf", x, w, preferred_element_type=out),
    "nk,fk->nf": lambda x, w, out: jnp.einsum("nk,fk->nf", x, w, preferred_element_type=out),
    "fk,nk->fn": lambda x, w, out: row_major(jnp.einsum("fk,nk->fn", w, x, preferred_element_type=out)).T,
}
SUMS = {"float32": jnp.float32, "bfloat16": jnp.float32, "int8": jnp.int32}


def microseconds(form: str, dtype: str, rows: int) -> float:
    random = np.random.default_rng(0)
    shape = (K, F) if form == "nk,kf->nf" else (F, K)
    matrices = [jnp.asarray(random.normal(0, 30, shape), dtype) for _ in range(MATRICES)]
    x_NK = jnp.asarray(random.normal(0, 30, (rows, K)), dtype)
    products = jax.jit(lambda x, matrices: [FORMS[form](x, w, SUMS[dtype]) + 1 for w in matrices])
    times = []
    for _ in range(ROUNDS + 1):  # the first one compiles
        started = time.perf_counter()
        jax.block_until_ready(products(x_NK, matrices))
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times[1:]) / MATRICES


def main() -> None:
    print("| rows | dtype | " + " | ".join(FORMS) + " |")
    print("|---|---|" + "---|" * len(FORMS))
    for dtype in SUMS:
        for rows in (1, 2, 4, 8, 16, 32, 128):
            times = " | ".join(f"{microseconds(form, dtype, rows):,.0f}" for form in FORMS)
            print(f"| {rows} | {dtype} | {times} |", flush=True)


if __name__ == "__main__":
    main()
