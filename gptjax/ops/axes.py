"""The axes of the mesh, as functions on arrays see them: what is cut where.

The compiler cuts most of a program by itself. It cannot cut a kernel, a layout constraint, or two cut axes that become
one; code with one of these asks here.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

ROWS = ("data", "fsdp")
"""Cut the rows of a batch."""
POSITIONS = "context"
"""Cuts the positions of a row."""
HEADS = "tensor"
"""Cuts heads, MLP width and vocabulary."""
STAGES = "stage"
"""Cuts the layers."""


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh that is set while tracing (`parallel.mesh.traced_in`); 1: there is none."""
    return _mesh().shape.get(axis, 1)


def compiler_cuts() -> bool:
    """Whether what is traced here may be cut by the compiler; not so inside of `per_device`."""
    mesh = _mesh()
    return mesh.size > 1 and AxisType.Auto in mesh.axis_types


def positions_cut() -> bool:
    """Whether positions are cut, so that rows and positions must stay two axes: merged, they would be gathered."""
    return compiler_cuts() and axis_size(POSITIONS) > 1


def flat(x: jax.Array) -> jax.Array:
    """Merges all axes but the last, which XLA:CPU multiplies fastest; leaves `x` as it is where positions are cut."""
    return x if positions_cut() else x.reshape(-1, x.shape[-1])


def pin(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Keeps `x` cut over these axes, one for each of its first dimensions; those that do not divide are left out."""
    if not compiler_cuts():
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, *axes))


def pin_batch(x: jax.Array) -> jax.Array:
    """Keeps `[B, T, ...]` cut over rows and positions."""
    return pin(x, ROWS, POSITIONS)


def spec_of(shape: tuple[int, ...], *axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """Cuts the first dimensions over these axes, where they divide."""
    mesh = _mesh()

    def divides(size: int, names: str | tuple[str, ...]) -> bool:
        count = 1
        for name in (names,) if isinstance(names, str) else names:
            count *= mesh.shape.get(name, 1)
        return size % count == 0

    return PartitionSpec(
        *(
            _known(mesh, names) if names and divides(size, names) else None
            for size, names in zip(shape, axes, strict=False)
        )
    )


def per_device(function: Callable[..., jax.Array], in_specs: Any, out_specs: Any) -> Callable[..., jax.Array]:
    """`function` on each device's own part, or `function` itself where nothing is cut."""
    if not compiler_cuts():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _known(mesh: AbstractMesh, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else tuple(name for name in names if name in mesh.shape)


def _mesh() -> AbstractMesh:
    return jax.sharding.get_abstract_mesh()
