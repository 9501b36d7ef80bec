"""Options of the device mesh."""

import dataclasses
import math

from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each axis. At most one axis may be -1: all remaining devices."""

    data: int = -1
    """Devices for data parallelism: each computes its own sequences."""
    fsdp: int = 1
    """Devices for fully sharded data parallelism: also shards parameters and optimizer state."""
    expert: int = 1
    """Devices for expert parallelism: data parallel, and shards the experts of a mixture of experts."""
    tensor: int = 1
    """Devices for tensor parallelism: shards attention heads, MLP width and vocabulary."""
    context: int = 1
    """Devices for context parallelism (ring attention): shards the positions of each sequence."""
    stage: int = 1
    """Devices for pipeline parallelism: shards the layers; micro-batches pass through the stages one after another."""

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"mesh.{name}={size} must be positive, or -1 for all devices that are left")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"mesh: only one axis may be -1, not {[n for n, s in sizes.items() if s == -1]}")

    @property
    def size(self) -> int:
        """Product of the axes, without one that is -1."""
        return math.prod(size for size in dataclasses.asdict(self).values() if size != -1)
