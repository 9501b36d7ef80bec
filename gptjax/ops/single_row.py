"""One row times a matrix on a CPU, at the pace at which memory gives the matrix.

XLA's library lays a matrix out anew for each product, which takes several times as long as the product of a single row.
So this one is written as sums of `STRIPES` rows of the matrix, each times a number: one loop of XLA's own, which
converts weights as it reads them. All stripes are read at once, each from its start to its end.

Shape suffixes: K contracted, F outputs; J stripe, G row of a stripe: row `j G + g` of the matrix is row g of stripe j.
"""

import math

import jax
import jax.numpy as jnp

STRIPES = 12  # by time; with 8 there are more partial sums to add up, with 24 too many streams to follow
CACHE_WAY = 4096
"""Bytes after which addresses fall into the same place of the first cache, which has room for a few of them."""


def striped(w_KF: jax.Array) -> jax.Array:
    """Lays out a matrix as `[J, G, F]`, with zeros behind its rows.

    Where stripes would begin at multiples of `CACHE_WAY`, all that are read at once would fall into one place of the
    cache (235 us instead of 107 for 24 stripes of 768 x 3072), so each has one row more then.
    """
    K, F = w_KF.shape
    G = math.ceil(K / STRIPES)
    if G * F * w_KF.dtype.itemsize % CACHE_WAY == 0:
        G += 1
    return jnp.pad(w_KF, ((0, STRIPES * G - K), (0, 0))).reshape(STRIPES, G, F)


def padded(x: jax.Array, w_JGF: jax.Array) -> jax.Array:
    """Adds zeros to `x [..., K]` for the rows that `striped` added."""
    J, G, _ = w_JGF.shape
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, J * G - x.shape[-1])])


def single_row_product(x_K: jax.Array, w_JGF: jax.Array) -> jax.Array:
    """Returns `x [K]` times a striped matrix: `[F]`, multiplied and summed in float32."""
    J, G, _ = w_JGF.shape
    x_JG1 = padded(x_K.astype(jnp.float32), w_JGF).reshape(J, G, 1)
    # In a loop over tokens XLA would convert the weights before the loop, and read four bytes for each.
    x_JG1, w_JGF = jax.lax.optimization_barrier((x_JG1, w_JGF))
    sums_GF = sum(x_JG1[j] * _float32(w_JGF[j]) for j in range(J))
    return jnp.ones(G) @ sums_GF  # a product: a sum over G would go to the library, with all that is above


def _float32(w: jax.Array) -> jax.Array:
    if w.dtype != jnp.bfloat16:
        return w.astype(jnp.float32)
    # The upper half of a float32. XLA's own conversion keeps the loop from being vectorized.
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
