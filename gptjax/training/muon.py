"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Shape suffixes: L layer, I inputs of a matrix, O outputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: they bring singular values near 1 fast, not exactly to 1."""


class MuonState(NamedTuple):
    """Momentum, one for each matrix."""

    mu: dict


def scale_by_muon(beta: float) -> optax.GradientTransformation:
    """Returns Nesterov momentum, orthogonalised, times sqrt(max(1, inputs / outputs)).

    Leaves are the stacked matrices of blocks, with a leading layer axis. Queries, keys and values of `w_qkv` are
    orthogonalised separately.
    """

    def init(params):
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        mu = jax.tree.map(lambda m, g: beta * m + (1.0 - beta) * g, state.mu, updates)
        nesterov = jax.tree.map(lambda m, g: beta * m + (1.0 - beta) * g, mu, updates)
        return jax.tree_util.tree_map_with_path(_orthogonal, nesterov), MuonState(mu)

    return optax.GradientTransformation(init, update)


def _orthogonal(path, leaf: jax.Array) -> jax.Array:
    part, name = path[-2].key, path[-1].key
    if name == "w_qkv":  # [L, D, G, E, C]
        query_heads = leaf.shape[3] - 2
        parts = jnp.split(leaf, (query_heads, query_heads + 1), axis=3)
        return jnp.concatenate([_of_matrix(x.reshape(*x.shape[:2], -1)).reshape(x.shape) for x in parts], axis=3)
    if (part, name) == ("mlp", "w_out"):  # stored with its outputs first
        return _of_matrix(leaf.swapaxes(-1, -2)).swapaxes(-1, -2)
    return _of_matrix(leaf)


def _of_matrix(x_LIO: jax.Array) -> jax.Array:
    inputs, outputs = x_LIO.shape[-2:]
    return orthogonalize(x_LIO) * max(1.0, inputs / outputs) ** 0.5


def orthogonalize(x: jax.Array) -> jax.Array:
    """Brings the singular values of matrices `[..., M, N]` near 1 by Newton-Schulz steps, in float32."""
    dtype, wide = x.dtype, x.shape[-2] <= x.shape[-1]
    x = x.astype(jnp.float32)
    x = x if wide else x.swapaxes(-1, -2)
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-7)
    x = _iterate_on_gram(x) if x.shape[-1] >= 2 * x.shape[-2] else _iterate(x)
    return (x if wide else x.swapaxes(-1, -2)).astype(dtype)


def _iterate(x: jax.Array) -> jax.Array:
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = jnp.einsum("...ik,...jk->...ij", x, x)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _iterate_on_gram(x: jax.Array) -> jax.Array:
    """Computes `_iterate` with fewer multiplications where `x` is wide.

    A step multiplies `x` by a polynomial of its Gram matrix, and the next Gram matrix is a polynomial of this one. So
    all steps are made on Gram matrices `[M, M]`, and their product is applied to `x` once.
    """
    a, b, c = COEFFICIENTS
    gram = jnp.einsum("...ik,...jk->...ij", x, x)
    identity = jnp.broadcast_to(jnp.eye(x.shape[-2], dtype=x.dtype), gram.shape)

    def factor_of(gram: jax.Array) -> jax.Array:
        return a * identity + b * gram + c * gram @ gram

    product = factor = factor_of(gram)
    for _ in range(STEPS - 1):
        gram = factor @ gram @ factor
        factor = factor_of(gram)
        product = factor @ product
    return product @ x
