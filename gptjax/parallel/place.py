"""Moves arrays between this process and the devices of all processes.

Shape suffixes: M micro-batch, B sequences in a micro-batch.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from gptjax.ops.axes import BATCH
from gptjax.parallel.mesh import replicated


def rows_of_process(mesh: Mesh, batch_size: int, micro_batch: int) -> np.ndarray:
    """Returns the indices of the sequences of a batch that this process's devices compute, ascending."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    pieces = sharding.addressable_devices_indices_map((micro_batch,)).values()
    local_B = np.unique(np.concatenate([np.arange(micro_batch)[piece] for piece in pieces if piece is not None]))
    return (np.arange(0, batch_size, micro_batch)[:, None] + local_B).reshape(-1)


def put_rows(rows: Any, sharding: NamedSharding, micro_batch: int) -> Any:
    """Builds the global batch `[M, B, ...]` from this process's sequences, leaves `[M, part of B, ...]`."""
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)

    def one(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0], micro_batch, *x.shape[2:]))

    return jax.tree.map(one, rows)


def put(tree: Any, sharding: Any) -> Any:
    """Shards arrays that every process has whole; `sharding` is one sharding for all leaves, or a tree of them."""
    if isinstance(sharding, Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(x: Any, where: Sharding) -> jax.Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(one, tree, sharding)


def get(mesh: Mesh, tree: Any) -> Any:
    """Gathers sharded arrays: NumPy arrays on process 0, None instead on the others. All processes must call it.

    Leaves are gathered one after the other, so that a device never holds more than one whole leaf.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))

    def one(x: jax.Array) -> np.ndarray | None:
        together = whole(x)
        return np.asarray(together) if jax.process_index() == 0 else None

    return jax.tree.map(one, tree)
