"""The grid of devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config.run import MeshConfig
from gptjax.errors import UserError
from gptjax.ops.axes import BATCH

Params = ParamSpec("Params")
Result = TypeVar("Result")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays devices, by default all there are, out along the axes of `config`, with -1 filled in.

    Raises:
        UserError: The axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    free = [name for name, size in sizes.items() if size == -1]
    if free and len(devices) % config.size == 0:
        sizes[free[0]] = len(devices) // config.size
    shape = tuple(sizes.values())
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size != 1)
        hint = "set mesh.data=-1 to use what is left"
        if config.size > len(devices):
            hint = f"the axes take {config.size}, so give smaller ones"
        raise UserError(f"{wanted} does not lay out {len(devices)} device(s); {hint}")
    # Auto axes: the compiler propagates shardings. `jax.make_mesh` defaults to Explicit since JAX 0.9.
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def traced_in(mesh: Mesh, function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Returns `function` that sees the mesh while it is traced, as kernels need that the compiler cannot cut."""

    @functools.wraps(function)
    def wrapped(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return wrapped


def batch_shards(mesh: Mesh) -> int:
    """How many pieces the rows of a batch are cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh, leading_axes: int = 0) -> NamedSharding:
    """Sharding of arrays `[..., rows, T]` with `leading_axes` axes before the rows."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_axes, BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
