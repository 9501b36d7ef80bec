"""The allocator of the process: pages of 2 MB, and large buffers that are kept from step to step.

XLA allocates its temporary buffer anew in each step. With pages of 4 kB, faulting them in costs a CPU up to a quarter
of the step; where the kernel clears large ones for each step, or the host of a virtual machine takes them away in
between, it is up to a fifth (measured, docs/performance.md). Both are settings of a process's start.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from gptjax.config.run import Config
from gptjax.machine.compile_cache import compiled_folder
from gptjax.machine.native import compiler
from gptjax.machine.processor import lines_of

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
PRELOAD = "LD_PRELOAD"
KEPT_BYTES = "GPTJAX_KEPT_BYTES"
KEPT_SHARE = 4
"""So large a part of the memory may be kept."""
SOURCE = Path(compiler.__file__).with_name("pages.cc")
THP_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def restart() -> None:
    """Starts this program again with an allocator that asks for huge pages and keeps large buffers, once.

    Whoever sets GLIBC_TUNABLES, to whatever, is left alone, and who loads an allocator by LD_PRELOAD keeps that one.
    """
    if TUNABLES in os.environ or KEPT_BYTES in os.environ:
        return
    settings = _huge_pages() | _kept_pages()
    if settings:
        os.environ |= settings
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def state() -> str:
    """Says what this process's allocator does, and if it does not all that it could, why."""
    if not uses_huge_pages():
        pages = "4 kB pages: needs glibc 2.35 and a kernel that gives huge pages on request (madvise)"
        if _has_huge_pages():
            pages = f"4 kB pages: {TUNABLES}={os.environ.get(TUNABLES, '')}"
    else:
        pages = "asks for huge pages"
    return f"{pages}; {'keeps' if keeps_pages() else 'does not keep'} large buffers"


def uses_huge_pages() -> bool:
    """Whether this process's allocator asks for huge pages."""
    return HUGE_PAGES in os.environ.get(TUNABLES, "") and _has_huge_pages()


def keeps_pages() -> bool:
    """Whether this process's allocator keeps large buffers for the next ones of their size."""
    try:
        return hasattr(ctypes.CDLL(None), "gptjax_kept_bytes")
    except (OSError, TypeError):  # no such thing on this system
        return False


def _huge_pages() -> dict[str, str]:
    return {TUNABLES: HUGE_PAGES} if _has_huge_pages() else {}


def _kept_pages() -> dict[str, str]:
    """Settings that load `native/pages.cc` before the C library; none, where it cannot be."""
    program = compiler.find()
    if _glibc() is None or os.environ.get(PRELOAD) or os.environ.get(compiler.SWITCH) == "0" or not program:
        return {}
    try:
        options = ("-ldl", "-Wl,--as-needed")
        path = str(compiler.library(program, SOURCE, (), options, "", compiled_folder(Config.cache_dir)))
        ctypes.CDLL(path)  # fails here rather than at each start, as where no file of the folder may be executed
    except (OSError, subprocess.SubprocessError):
        return {}
    if " " in path or ":" in path:  # both part names there
        return {}
    return {PRELOAD: path, KEPT_BYTES: str(usable_memory() // KEPT_SHARE)}


def usable_memory() -> int:
    """Bytes that this process may use: the machine's, or fewer where a control group, as of a container, says so."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in lines_of(OWN_GROUPS):
        _, controller, path = line.split(":", 2)
        limit = {"": "memory.max", "memory": "memory.limit_in_bytes"}.get(controller)  # version 2, version 1
        own = GROUPS / controller / path.lstrip("/")
        texts = [text for group in (own, *own.parents) if limit for text in lines_of(group / limit)]
        sizes += [int(text) for text in texts if text.isdecimal()]  # "max": none
    return min(sizes)


def _has_huge_pages() -> bool:
    """glibc knows the setting since 2.35, and the kernel gives huge pages to those who ask where it says madvise."""
    version = _glibc()
    return version is not None and version >= (2, 35) and any("[madvise]" in line for line in lines_of(THP_SETTING))


def _glibc() -> tuple[int, ...] | None:
    """Its version; nothing with another C library or system."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return tuple(map(int, version.split("."))) if library == "glibc" else None
    except (AttributeError, ValueError):
        return None
