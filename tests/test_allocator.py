import os
import subprocess
import sys

import pytest

from gptjax.machine import allocator
from gptjax.machine.compile_cache import compiled_folder
from gptjax.machine.native import compiler

REPORT = """
import os
from gptjax.machine import allocator
allocator.restart()
print(allocator.uses_huge_pages(), allocator.keeps_pages(), os.getpid())
"""
OURS = (allocator.TUNABLES, allocator.KEPT_BYTES, allocator.PRELOAD)


def start(program: str, **environment: str) -> tuple[list[str], int]:
    """What a program in a process of its own printed, in words, and the process's number."""
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=clean | environment, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate()
    assert process.returncode == 0
    return output.split(), process.pid


def can_keep() -> bool:
    return allocator._glibc() is not None and compiler.find() is not None


def test_a_program_restarts_itself_once():
    if not allocator._has_huge_pages():
        pytest.skip("this system gives no huge pages on request")
    (huge, kept, process), number = start(REPORT)
    assert (huge, kept) == ("True", str(can_keep()))
    assert process == str(number), "it is still the same process, as signals and supervisors need"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, ["False", "False"]),
        ({"LD_PRELOAD": "libm.so.6"}, [str(allocator._has_huge_pages()), "False"]),
        ({compiler.SWITCH: "0"}, [str(allocator._has_huge_pages()), "False"]),
        ({"CXX": "no-such", "PATH": "/nowhere"}, [str(allocator._has_huge_pages()), "False"]),
    ],
)
def test_settings_of_the_users_own_are_left_alone(setting, expected):
    assert start(REPORT, **setting)[0][:2] == expected


LARGE = """
import ctypes, os
c = ctypes.CDLL(None)
c.free.argtypes = [ctypes.c_void_p]
c.realloc.argtypes, c.realloc.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
c.malloc_usable_size.argtypes, c.malloc_usable_size.restype = [ctypes.c_void_p], ctypes.c_size_t
c.gptjax_kept_bytes.restype = ctypes.c_size_t
MB = 1 << 20

def take(size, alignment=64):
    to = ctypes.c_void_p()
    assert c.posix_memalign(ctypes.byref(to), ctypes.c_size_t(alignment), ctypes.c_size_t(size)) == 0
    return to.value

def written(size):
    at = take(size)
    ctypes.memset(at, 1, size)
    return at

def resident():  # in units of 64 MB
    return round(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB / 64 - without)

without = 0
without = resident()
"""


def keeping(program: str, kept_bytes: int = 2**40) -> list[str]:
    """What a program printed whose allocator keeps so many bytes."""
    if not can_keep():
        pytest.skip("it needs glibc and a C++ compiler")
    settings = allocator._kept_pages()
    return start(LARGE + program, **settings | {allocator.KEPT_BYTES: str(kept_bytes)})[0]


def test_a_large_buffer_is_kept_for_the_next_one_of_its_size():
    words = keeping("""
at = take(64 * MB)
ctypes.memset(at, 7, 64 * MB)
c.free(at)
print(c.gptjax_kept_bytes() // MB)
again = take(63 * MB)
print(again == at, ctypes.string_at(again, 1)[0], c.gptjax_kept_bytes())
both = take(63 * MB)
print(both != again)
""")
    assert words == ["64", "True", "7", "0", "True"]


def test_what_is_kept_goes_when_another_size_is_asked_for():
    words = keeping("""
c.free(written(128 * MB))
print(c.gptjax_kept_bytes() // MB, resident())
larger = written(640 * MB)
print(c.gptjax_kept_bytes(), resident())
c.free(larger)
smaller = take(256 * MB)
print(c.gptjax_kept_bytes(), resident())
""")
    assert words == ["128", "2", "0", "10", "0", "0"]


def test_what_is_given_back_after_another_size_was_asked_for_is_not_kept():
    words = keeping("""
at = written(128 * MB)
other = written(192 * MB)
c.free(at)
print(c.gptjax_kept_bytes(), resident())
c.free(other)
print(c.gptjax_kept_bytes() // MB, resident())
""")
    assert words == ["0", "3", "192", "3"]


def test_no_more_is_kept_than_is_allowed():
    words = keeping(
        """
one, two = written(128 * MB), written(128 * MB)
c.free(one)
c.free(two)
print(c.gptjax_kept_bytes() // MB, resident())
""",
        kept_bytes=200 << 20,
    )
    assert words == ["128", "2"]


def test_the_next_buffer_is_the_last_one_that_is_given_back_a_moment_later():
    words = keeping("""
import threading

def is_waited_for():
    at = take(64 * MB)
    threading.Timer(0.001, c.free, [at]).start()
    return take(64 * MB) == at

print(any(is_waited_for() for _ in range(20)))  # on a busy machine the moment may be longer than the patience
""")
    assert words == ["True"]


def test_what_nobody_asks_for_in_a_long_time_goes():
    words = keeping("""
both = written(128 * MB), written(128 * MB)
for at in both:
    c.free(at)
print(resident())
for _ in range(70):
    c.free(take(128 * MB))
print(resident(), c.gptjax_kept_bytes() // MB)
""")
    assert words == ["4", "2", "128"]


def test_the_rest_of_the_allocator_is_the_c_librarys():
    words = keeping("""
large = take(64 * MB)
ctypes.memset(large, 5, 64 * MB)
print(large % 4096, c.malloc_usable_size(large) // MB, take(100, 4096) % 4096)
moved = c.realloc(large, 100)
print(ctypes.string_at(moved, 100) == bytes([5]) * 100, c.gptjax_kept_bytes() // MB, c.malloc_usable_size(moved) >= 100)
print(ctypes.string_at(c.realloc(moved, 40 * MB), 100) == bytes([5]) * 100)
to = ctypes.c_void_p()
print(c.posix_memalign(ctypes.byref(to), ctypes.c_size_t(24), ctypes.c_size_t(64 * MB)))
print(c.posix_memalign(ctypes.byref(to), ctypes.c_size_t(64), ctypes.c_size_t(2**62)))
c.free(None)
many = [take(32 * MB) for _ in range(300)]  # more than there are slots
print(len(set(many)))
for at in many:
    c.free(at)
""")
    assert words == ["0", "64", "0", "True", "64", "True", "True", "22", "12", "300"]


def test_threads_do_not_share_a_buffer():
    words = keeping("""
import threading
wrong = []

def work(number):
    for _ in range(300):
        at = take((32 + 8 * (number % 2)) * MB)
        ctypes.memset(at, number, 4096)
        os.sched_yield()
        if ctypes.string_at(at, 4096) != bytes([number]) * 4096:
            wrong.append(at)
        c.free(at)

threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(wrong), c.gptjax_kept_bytes() <= 8 * 40 * MB)
""")
    assert words == ["0", "True"]


@pytest.mark.parametrize("name", ["with space", "with:colon"])
def test_a_folder_that_cannot_be_named_is_left_out(name, tmp_path):
    assert start(REPORT, HOME=str(tmp_path / name))[0][1] == "False"
    assert start(REPORT, HOME=str(tmp_path / "plain"))[0][1] == str(can_keep())


def test_the_library_is_made_once(monkeypatch):
    if not can_keep():
        pytest.skip("it needs glibc and a C++ compiler")
    first = allocator._kept_pages()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was compiled again"))
    assert allocator._kept_pages() == first
    assert first[allocator.PRELOAD].startswith(str(compiled_folder(allocator.Config.cache_dir)))


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/slice/job", {"slice/job/memory.max": "max", "slice/memory.max": "5000"}, 5000),
        (
            "4:memory:/job\n0::/",
            {"memory/job/memory.limit_in_bytes": "3000", "memory/memory.limit_in_bytes": "7000"},
            3000,
        ),
        ("0::/", {}, None),
    ],
)
def test_a_container_may_use_less_than_the_machine_has(tmp_path, monkeypatch, own, limits, expected):
    (tmp_path / "own").write_text(own)
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{limit}\n")
    monkeypatch.setattr(allocator, "OWN_GROUPS", tmp_path / "nothing")
    machine = allocator.usable_memory()
    monkeypatch.setattr(allocator, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(allocator, "GROUPS", tmp_path)
    assert allocator.usable_memory() == (expected or machine)
