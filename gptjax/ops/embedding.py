"""The embedding lookup. Its gradient is a one-hot matmul for small vocabularies, and deterministic on request.

Shape suffixes: B batch, T position, D n_embd, V vocabulary; N = B times T rows, which are sorted by token and divided
into Z tiles of R rows; P = R, the largest number of different tokens in a tile.
"""

import jax
import jax.numpy as jnp

from gptjax.machine.platform import target_platform
from gptjax.ops.axes import positions_sharded, sharded_by_compiler
from gptjax.ops.matmul import dot
from gptjax.ops.scheduling import deterministic_ops_requested

ONE_HOT_VOCAB = 1024  # up to this size a one-hot matmul is faster than a scatter in the embedding's gradient
TILE = 128
"""Rows that one matmul sums."""


def embedding(w_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Looks up rows of `w_VD`: `[B, T, D]` in its dtype. Ids out of range are clamped; batches are checked earlier."""
    if w_VD.shape[0] <= ONE_HOT_VOCAB:
        return _small_embedding(w_VD, tokens_BT)
    if target_platform() == "gpu" and deterministic_ops_requested() and not sharded_by_compiler():
        return _deterministic_embedding(w_VD, tokens_BT)
    return w_VD[tokens_BT]


@jax.custom_vjp
def _small_embedding(w_VD, tokens_BT):
    return w_VD[tokens_BT]


def _small_embedding_backward(saved, dx_BTD):
    w_VD, tokens_BT = saved
    if positions_sharded():
        one_hot_BTV = (tokens_BT[:, :, None] == jnp.arange(w_VD.shape[0])[None, None]).astype(dx_BTD.dtype)
        return dot("btv,btd->vd", one_hot_BTV, dx_BTD, w_VD.dtype), None
    one_hot_VN = (tokens_BT.reshape(1, -1) == jnp.arange(w_VD.shape[0])[:, None]).astype(dx_BTD.dtype)
    return dot("vn,nd->vd", one_hot_VN, dx_BTD.reshape(-1, w_VD.shape[1]), w_VD.dtype), None


_small_embedding.defvjp(lambda w_VD, tokens_BT: (w_VD[tokens_BT], (w_VD, tokens_BT)), _small_embedding_backward)


@jax.custom_vjp
def _deterministic_embedding(w_VD, tokens_BT):
    return w_VD[tokens_BT]


def _deterministic_embedding_backward(saved, dx_BTD):
    w_VD, tokens_BT = saved
    return sum_by_token(w_VD.shape[0], tokens_BT.reshape(-1), dx_BTD.reshape(-1, w_VD.shape[1])), None


_deterministic_embedding.defvjp(
    lambda w_VD, tokens_BT: (w_VD[tokens_BT], (w_VD, tokens_BT)), _deterministic_embedding_backward
)


def sum_by_token_reference(V: int, tokens_N: jax.Array, x_ND: jax.Array) -> jax.Array:
    """Computes `sum_by_token` with a scatter."""
    return jnp.zeros((V, x_ND.shape[1]), x_ND.dtype).at[tokens_N].add(x_ND)


def sum_by_token(V: int, tokens_N: jax.Array, x_ND: jax.Array) -> jax.Array:
    """Sums the rows of each token: `[V, D]`, with the same bits in every run.

    A scatter on a GPU is not deterministic, because its atomic additions have no fixed order. Here the rows are sorted
    by token and divided into tiles. In each tile a matmul with a one-hot matrix sums the rows of each token. Sums of
    the same token in later tiles are added to its first one. Then each token has one sum, which is scattered.
    """
    padding = -tokens_N.shape[0] % TILE
    order_N = jnp.argsort(tokens_N)
    ids_ZR = jnp.pad(tokens_N[order_N], (0, padding), constant_values=V).reshape(-1, TILE)
    x_ZRD = jnp.pad(x_ND[order_N], ((0, padding), (0, 0))).reshape(*ids_ZR.shape, -1)
    begins_ZR = jnp.pad(ids_ZR[:, 1:] != ids_ZR[:, :-1], ((0, 0), (1, 0)))
    place_ZR = jnp.cumsum(begins_ZR, axis=1)  # index of a row's token within its tile
    member_ZPR = place_ZR[:, None] == jnp.arange(TILE)[None, :, None]
    sums_ZPD = jnp.einsum("zpr,zrd->zpd", member_ZPR.astype(x_ND.dtype), x_ZRD, precision="highest")
    token_ZP = jnp.min(jnp.where(member_ZPR, ids_ZR[:, None], V), axis=-1)

    first_Z, last_Z, tile_Z = ids_ZR[:, 0], ids_ZR[:, -1], jnp.arange(ids_ZR.shape[0])
    continues_Z = jnp.pad(first_Z[1:] == last_Z[:-1], (1, 0))
    later_ZZ = continues_Z[None] & (first_Z[None] == last_Z[:, None]) & (tile_Z[None] > tile_Z[:, None])
    rest_ZD = jnp.dot(later_ZZ.astype(x_ND.dtype), sums_ZPD[:, 0], precision="highest")
    sums_ZPD += jnp.where(member_ZPR[:, :, -1:], rest_ZD[:, None], 0.0)
    token_ZP = jnp.where(continues_Z[:, None] & (jnp.arange(TILE)[None] == 0), V, token_ZP)

    # Unused places get distinct indices beyond the end, which the scatter drops.
    token_N = token_ZP.reshape(-1)
    index_N = jnp.where(token_N < V, token_N, V + jnp.arange(token_N.shape[0]))
    table_VD = jnp.zeros((V, x_ND.shape[1]), x_ND.dtype)
    return table_VD.at[index_N].set(sums_ZPD.reshape(token_N.shape[0], -1), mode="drop", unique_indices=True)
