"""Detects, without importing JAX, whether JAX will find a GPU or TPU."""

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
"""Device files below /dev, and for each the packages of which JAX needs one."""


def has_accelerator(environment: Mapping[str, str] = os.environ, folder: Path = Path("/dev")) -> bool:
    """Whether a device and JAX's plugin for it exist, and `JAX_PLATFORMS` does not select the CPU."""
    if environment.get("JAX_PLATFORMS", "").partition(",")[0] == "cpu":
        return False
    return any(
        any(importlib.util.find_spec(package) for package in packages)
        for name, packages in DEVICES.items()
        if any(folder.glob(name))
    )
