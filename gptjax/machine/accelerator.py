"""Whether JAX will find a GPU or TPU, answered before JAX is imported."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

DEVICES = {
    "nvidia[0-9]*": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "kfd": ("jax_rocm60_plugin", "jax_rocm7_plugin"),
    "accel[0-9]*": ("libtpu",),
    "vfio/[0-9]*": ("libtpu",),
}
"""Names below /dev, and the packages of which JAX needs one to use such a device."""


def has_accelerator(environment: Mapping[str, str] = os.environ, folder: Path = Path("/dev")) -> bool:
    """Whether a device and JAX's plugin for it are there, and `JAX_PLATFORMS` does not choose the CPU."""
    if environment.get("JAX_PLATFORMS", "").partition(",")[0] == "cpu":
        return False
    return any(
        any(importlib.util.find_spec(package) for package in packages)
        for name, packages in DEVICES.items()
        if any(folder.glob(name))
    )
