"""The processor's name, instructions and cores, as the operating system reports them."""

import hashlib
import os
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def core_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for matmuls in bfloat16; False if the system does not report it."""
    return not processor_flags().isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))  # the last one: Arm


def processor_flags() -> set[str]:
    """Names of the processor's instruction sets, as in /proc/cpuinfo; empty on other systems."""
    return {word for line in _processor_lines() for word in line.split()}


def identity() -> str:
    """A name for this kind of processor: its architecture, and a hash of its model and instruction sets."""
    identity = "\n".join([platform.machine(), platform.processor(), *_processor_lines()])
    return f"{platform.machine()}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _processor_lines() -> list[str]:
    words = ("model name", "flags", "Features", "CPU part")
    return sorted({line for line in lines_of(CPU_INFO) if line.startswith(words)})


def lines_of(path: Path) -> list[str]:
    """The lines of a system file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
