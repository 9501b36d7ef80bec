"""Multiplies one row by a matrix on a CPU, at the speed of memory.

XLA's library repacks the matrix in every matmul, which takes several times as long as the multiplication of one row. So
this matmul is a sum of `STRIPES` rows of the matrix, each times a number. XLA compiles it into one loop, which converts
the weights as it reads them. The loop reads all stripes in parallel, each sequentially.

Used only without the C++ kernels. Kept because bfloat16 takes half to four fifths of the library's time, and int8 half
to three quarters (`bench/matmuls.py one_row`, docs/experiments/decoding.md).

Shape suffixes: K contracted, F outputs; J stripe, G row of a stripe: row `j G + g` of the matrix is row g of stripe j.
"""

import math

import jax
import jax.numpy as jnp

STRIPES = 12  # the fastest: fewer stripes need more partial sums, more stripes are too many streams to prefetch
CACHE_WAY = 4096
"""Bytes after which addresses map to the same set of the L1 cache, which holds only a few of them."""


def to_stripes(w_KF: jax.Array) -> jax.Array:
    """Lays out a matrix as `[J, G, F]`, padded with zero rows.

    If the size of a stripe is a multiple of `CACHE_WAY`, all stripes map to one set of the cache, so a row is added.
    """
    K, F = w_KF.shape
    G = math.ceil(K / STRIPES)
    if G * F * w_KF.dtype.itemsize % CACHE_WAY == 0:
        G += 1
    return jnp.pad(w_KF, ((0, STRIPES * G - K), (0, 0))).reshape(STRIPES, G, F)


def pad_to_stripes(x: jax.Array, w_JGF: jax.Array) -> jax.Array:
    """Pads `x [..., K]` with zeros for the rows that `to_stripes` added."""
    J, G, _ = w_JGF.shape
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, J * G - x.shape[-1])])


def single_row_matmul(x_K: jax.Array, w_JGF: jax.Array) -> jax.Array:
    """Multiplies `x [K]` by a striped matrix in float32; returns `[F]`."""
    J, G, _ = w_JGF.shape
    x_JG1 = pad_to_stripes(x_K.astype(jnp.float32), w_JGF).reshape(J, G, 1)
    # Without the barrier XLA would convert the weights once before the loop over tokens, and read 4 bytes for each.
    x_JG1, w_JGF = jax.lax.optimization_barrier((x_JG1, w_JGF))
    sums_GF = sum(x_JG1[j] * _float32(w_JGF[j]) for j in range(J))
    return jnp.ones(G) @ sums_GF  # a matmul: XLA would pass a sum over G to the library, with everything above


def _float32(w: jax.Array) -> jax.Array:
    if w.dtype != jnp.bfloat16:
        return w.astype(jnp.float32)
    # bfloat16 is the upper half of a float32. XLA's own conversion would prevent vectorisation of the loop.
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
