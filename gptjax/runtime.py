"""Settings of the process that must stand before JAX starts: huge pages, and the cache of compiled programs."""

import os
import sys
from pathlib import Path

from gptjax.config import Config

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
THP_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def start(cache_dir: str = Config.cache_dir) -> None:
    """Turns on the cache of compiled programs; what it holds is executed, so only its owner may write there."""
    import jax

    folder = Path(cache_dir).expanduser() / "compiled"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def restart_with_huge_pages() -> None:
    """Starts this program again with an allocator that asks for huge pages, where that is possible and not done yet.

    XLA allocates its temporary buffer anew in each step. With pages of 4 kB, faulting them in costs a CPU up to a
    quarter of the step (measured, docs/performance.md), and glibc reads this setting at the start of a process only.
    Whoever sets GLIBC_TUNABLES, to whatever, is left alone.
    """
    if TUNABLES in os.environ or not _has_huge_pages():
        return
    os.environ[TUNABLES] = HUGE_PAGES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def uses_huge_pages() -> bool:
    """Whether this process's allocator asks for huge pages."""
    return HUGE_PAGES in os.environ.get(TUNABLES, "") and _has_huge_pages()


def _has_huge_pages() -> bool:
    """glibc knows the setting since 2.35, and the kernel gives huge pages to those who ask where it says madvise."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        known = library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        return known and "[madvise]" in THP_SETTING.read_text()
    except (AttributeError, ValueError, OSError):  # another C library or system
        return False
