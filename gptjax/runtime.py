"""Settings of the process that must stand before JAX starts: memory allocator, compiled programs' cache."""

import ctypes
import sys
from pathlib import Path

from gptjax.config import Config

# mallopt's names, from glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
KEEP_PAGES = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20))


def start(cache_dir: str = Config.cache_dir) -> None:
    """Readies the process; call it before anything else imports JAX."""
    keep_pages()
    import jax

    folder = Path(cache_dir).expanduser() / "compiled"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what it holds is executed: only its owner may write there
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def keep_pages() -> bool:
    """Tells glibc to keep freed memory; returns whether it did.

    XLA allocates its temporary buffer anew in each step, and faulting in fresh pages costs a CPU about a tenth of
    the step (measured, docs/performance.md). Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    return all(libc.mallopt(option, value) for option, value in KEEP_PAGES)
