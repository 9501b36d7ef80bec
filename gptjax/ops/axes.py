"""Names of the mesh axes, and helpers for code that XLA's sharding propagation does not cover.

The compiler shards most of a program by itself. It cannot shard a kernel, a layout constraint, or two sharded axes that
become one; code with one of these uses the helpers below.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

EXPERTS = "expert"
"""Shards the experts of a mixture."""
BATCH = ("data", "fsdp", EXPERTS)
"""Shard the sequences of a batch."""
POSITIONS = "context"
"""Shards the positions of a sequence."""
HEADS = "tensor"
"""Shards heads, MLP width and vocabulary."""
STAGES = "stage"
"""Shards the layers."""


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh that is set while tracing (`parallel.mesh.traced_in`); 1 if it has none."""
    return _mesh().shape.get(axis, 1)


def sharded_by_compiler() -> bool:
    """Whether the compiler may shard the arrays that are traced here; false inside `per_device`."""
    mesh = _mesh()
    return mesh.size > 1 and AxisType.Auto in mesh.axis_types


def positions_sharded() -> bool:
    """Whether positions are sharded. Batch and positions must then stay two axes: merging them would gather them."""
    return sharded_by_compiler() and axis_size(POSITIONS) > 1


def merge_leading_axes(x: jax.Array) -> jax.Array:
    """Merges all axes but the last, because XLA:CPU multiplies matrices fastest; no-op where positions are sharded."""
    return x if positions_sharded() else x.reshape(-1, x.shape[-1])


def constrain_sharding(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Shards the first dimensions of `x` over these mesh axes; ignores an axis that does not divide its dimension."""
    if not sharded_by_compiler():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, *axes))


def constrain_batch(x: jax.Array) -> jax.Array:
    """Shards `[B, T, ...]` over batch and positions."""
    return constrain_sharding(x, BATCH, POSITIONS)


def partition_spec(shape: tuple[int, ...], *axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """Returns the spec that shards the first dimensions over these mesh axes, where they divide them."""
    mesh = _mesh()

    def divides(size: int, names: str | tuple[str, ...]) -> bool:
        count = 1
        for name in (names,) if isinstance(names, str) else names:
            count *= mesh.shape.get(name, 1)
        return size % count == 0

    return PartitionSpec(
        *(
            _existing(mesh, names) if names and divides(size, names) else None
            for size, names in zip(shape, axes, strict=False)
        )
    )


def per_device(function: Callable[..., jax.Array], in_specs: Any, out_specs: Any) -> Callable[..., jax.Array]:
    """Maps `function` over the shards of its arguments (`shard_map`); returns it unchanged where nothing is sharded."""
    if not sharded_by_compiler():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _existing(mesh: AbstractMesh, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else tuple(name for name in names if name in mesh.shape)


def _mesh() -> AbstractMesh:
    return jax.sharding.get_abstract_mesh()
