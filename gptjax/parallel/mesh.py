"""The device mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config.mesh import MeshConfig
from gptjax.errors import UserError
from gptjax.ops.axes import BATCH

Params = ParamSpec("Params")
Result = TypeVar("Result")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices (default: all) along the axes of `config`; an axis of -1 takes the remaining devices.

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
        hint = "set mesh.data=-1 to use the remaining devices"
        if config.size > len(devices):
            hint = f"the axes need {config.size}, so make them smaller"
        raise UserError(f"{wanted} does not match {len(devices)} device(s); {hint}")
    # Auto axes: the compiler propagates shardings. `jax.make_mesh` defaults to Explicit since JAX 0.9.
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def traced_in(mesh: Mesh, function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Wraps `function` so that it is traced with the mesh set; kernels, which XLA cannot shard, need the mesh."""

    @functools.wraps(function)
    def wrapped(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return wrapped


def describe_layout(sizes: Mapping[str, int]) -> str:
    """The axes with more than one device: `data 4 x tensor 2`."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of the batch dimension."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh, leading_axes: int = 0) -> NamedSharding:
    """Sharding of arrays `[..., B, T]` with `leading_axes` axes before the batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_axes, BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
