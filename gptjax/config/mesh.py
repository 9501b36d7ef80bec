"""Options of the device mesh."""

import dataclasses
import math

from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each axis; at most one axis is -1: all devices that are left."""

    data: int = -1
    """Data parallel: each device has its own sequences."""
    fsdp: int = 1
    """Data parallel with parameters and optimizer state sharded over the devices."""
    expert: int = 1
    """Data parallel with the experts of a mixture sharded over the devices."""
    tensor: int = 1
    """Heads, MLP width and vocabulary sharded over the devices."""
    context: int = 1
    """Positions of each sequence sharded over the devices; keys and values are passed around the ring."""
    stage: int = 1
    """Pipeline stages: layers sharded over the devices, which micro-batches pass one after another."""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{name}={size} must be positive, or -1 for all devices that are left")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"mesh: only one axis may be -1, not {[n for n, s in sizes.items() if s == -1]}")

    @property
    def size(self) -> int:
        """Devices that the axes take, one that is -1 left out."""
        return math.prod(size for size in dataclasses.asdict(self).values() if size != -1)
