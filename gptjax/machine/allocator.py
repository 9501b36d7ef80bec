"""The memory settings of the process: huge pages, and a cache of large buffers.

XLA allocates its temporary buffer again in each step. On a CPU with pages of 4 kB, page faults take up to a quarter of
a step. Up to a fifth of a step passes while the operating system clears the pages of large buffers, or gets them from
the host of a virtual machine (docs/experiments/memory.md). Both settings are read when a process starts, so on a CPU
`train` and `sample` restart themselves once.
"""

import contextlib
import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from gptjax.config.run import Config
from gptjax.machine.accelerator import has_accelerator
from gptjax.machine.compile_cache import compiled_folder
from gptjax.machine.native import compiler
from gptjax.machine.private import UntrustedError
from gptjax.machine.processor import lines_of

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
PRELOAD = "LD_PRELOAD"
CACHE_BYTES = "GPTJAX_BUFFER_CACHE_BYTES"
RESTARTED = "GPTJAX_RESTARTED"
"""Lists, separated by commas, the variables that the restart has set; read by the restarted process."""
CACHE_SHARE = 4
"""The buffer cache may hold one part in this many of the memory, divided among a run's processes on this machine."""
LOCAL_PROCESSES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
"""Variables of launchers whose values begin with the number of processes on this machine."""
SOURCE = Path(compiler.__file__).with_name("buffer_cache.cc")
THP_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
STATUS = Path("/proc/self/status")
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_asked_for_huge_pages = False
_restarted = False


def restart(cache_dir: str = Config.cache_dir, processes: int = 1) -> None:
    """Restarts this program once with faster memory settings; does nothing if `reason_not_to_restart` gives a reason.

    Args:
        cache_dir: Folder of the buffer cache's library.
        processes: Largest number of processes of the run on this machine.
    """
    remove_restart_settings()
    if reason_not_to_restart():
        return
    settings = _huge_pages() | _buffer_cache(cache_dir, processes)
    if not settings:
        return
    environment = os.environ | settings | {RESTARTED: ",".join(settings)}
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # the program then continues without the settings
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def remove_restart_settings() -> None:
    """Removes the variables of a restart from the environment, so that child processes do not inherit them."""
    global _restarted, _asked_for_huge_pages
    names = os.environ.pop(RESTARTED, "")
    if names:
        _restarted, _asked_for_huge_pages = True, TUNABLES in names.split(",")
        for name in names.split(","):
            os.environ.pop(name, None)


def reason_not_to_restart(environment: Mapping[str, str] = os.environ) -> str:
    """Returns why this process does not restart with other memory settings; empty: it restarts."""
    if _restarted:
        return "it did already"
    if sys.platform != "linux" or _glibc() is None:
        return "this is not Linux with glibc"
    for name in (TUNABLES, PRELOAD):
        if name in environment:
            return f"{name} is set"
    if has_accelerator(environment):
        return "a GPU or TPU is used"
    if _is_watched():
        return "a debugger, tracer or profiler watches this process"
    if sys.argv[:1] in ([], [""], ["-"]):
        return "the program is read from standard input"
    return ""


def state() -> str:
    """Describes the memory settings of this process."""
    pages = "huge pages" if uses_huge_pages() else "pages of 4 kB"
    return f"{pages}, {'a' if caches_buffers() else 'no'} cache of large buffers"


def state_after_restart(cache_dir: str) -> str:
    """Describes the memory settings that `train` and `sample` will have on this machine."""
    if reason := reason_not_to_restart():
        return f"{state()}; train and sample do not restart for more: {reason}"
    pages = "huge pages" if _huge_pages() or uses_huge_pages() else "pages of 4 kB"
    cache = "a" if _buffer_cache(cache_dir, 1) else "no"
    return f"train and sample restart once and then have {pages}, {cache} cache of large buffers"


def uses_huge_pages() -> bool:
    """Whether large buffers of this process use huge pages."""
    asked = _asked_for_huge_pages or HUGE_PAGES in os.environ.get(TUNABLES, "")
    return _thp("always") or (asked and _can_ask_for_huge_pages())


def caches_buffers() -> bool:
    """Whether this process caches large buffers for later requests of their size."""
    try:
        return hasattr(ctypes.CDLL(None), "gptjax_cached_bytes")
    except (OSError, TypeError):  # not on this system
        return False


def release_freed_memory() -> None:
    """Returns freed memory to the system, which glibc would keep; does nothing with other C libraries."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def usable_memory() -> int:
    """Bytes that this process may use: the machine's memory, or the limit of a control group (container) if lower."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in lines_of(OWN_GROUPS):
        _, controller, path = line.split(":", 2)
        limit = {"": "memory.max", "memory": "memory.limit_in_bytes"}.get(controller)  # version 2, version 1
        own = GROUPS / controller / path.lstrip("/")
        texts = [text for group in (own, *own.parents) if limit for text in lines_of(group / limit)]
        sizes += [int(text) for text in texts if text.isdecimal()]  # "max": none
    return min(sizes)


def _huge_pages() -> dict[str, str]:
    """The setting that requests huge pages; empty if it has no effect here."""
    return {TUNABLES: HUGE_PAGES} if _can_ask_for_huge_pages() else {}


def _can_ask_for_huge_pages() -> bool:
    """Whether huge pages can be requested: with glibc 2.35 or later, if the kernel's setting is madvise."""
    version = _glibc()
    return version is not None and version >= (2, 35) and _thp("madvise")


def _thp(setting: str) -> bool:
    return any(f"[{setting}]" in line for line in lines_of(THP_SETTING))


def _buffer_cache(cache_dir: str, processes: int) -> dict[str, str]:
    """Settings that load `native/buffer_cache.cc` before the C library; empty if that is not possible."""
    program = compiler.find()
    if compiler.level() == "0" or not program:
        return {}
    try:
        options = ("-ldl", "-Wl,--as-needed")
        path = str(compiler.library(program, SOURCE, (), options, "", _folder(cache_dir)))
        ctypes.CDLL(path)  # fails here instead of at each start, for example if the folder is mounted noexec
    except (OSError, subprocess.SubprocessError):
        return {}
    if " " in path or ":" in path:  # both are separators in LD_PRELOAD
        return {}
    processes = max(processes, *_local_processes(os.environ))
    return {PRELOAD: path, CACHE_BYTES: str(usable_memory() // (CACHE_SHARE * processes))}


def _folder(cache_dir: str) -> Path:
    try:
        return compiled_folder(cache_dir)
    except UntrustedError:
        return compiled_folder(Config.cache_dir)


def _local_processes(environment: Mapping[str, str]) -> list[int]:
    """Numbers of this job's processes on this machine, according to the launchers' variables."""
    numbers = [re.match(r"\d+", environment.get(name, "")) for name in LOCAL_PROCESSES]
    return [1, *(int(number[0]) for number in numbers if number)]


def _is_watched() -> bool:
    """Whether a debugger, tracer or profiler watches this process. A restart would detach it or be counted twice."""
    if sys.gettrace() is not None or sys.getprofile() is not None:
        return True
    tools = getattr(sys, "monitoring", None)  # Python 3.12
    if tools is not None and any(tools.get_tool(number) for number in range(6)):
        return True
    return any(line.split()[0] == "TracerPid:" and line.split()[1] != "0" for line in lines_of(STATUS) if line.split())


def _glibc() -> tuple[int, ...] | None:
    """Version of glibc; None with another C library or system."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return tuple(map(int, version.split("."))) if library == "glibc" else None
    except (AttributeError, ValueError):
        return None
