import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.cli import NO_RESTART, main
from gptjax.machine import allocator
from gptjax.machine.compile_cache import compiled_folder
from gptjax.machine.native import compiler

ROOT = Path(__file__).parents[1]
REPORT = """
import os, sys
from gptjax.machine import allocator
allocator.restart(*sys.argv[1:])
print(allocator.uses_huge_pages(), allocator.caches_buffers(), os.getpid())
print(len([name for name in os.environ if name in (*OURS, allocator.RESTARTED)]))
"""
OURS = (allocator.TUNABLES, allocator.CACHE_BYTES, allocator.PRELOAD)
REPORT = REPORT.replace("OURS", repr(OURS))


def start(program: str, *args: str, **environment: str) -> tuple[list[str], int]:
    """Runs a program in a separate process; returns the words that it printed, and its process id."""
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    clean |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *args], env=clean | environment, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate()
    assert process.returncode == 0
    return output.split(), process.pid


def can_cache() -> bool:
    return allocator._glibc() is not None and compiler.find() is not None and compiler.level() != "0"


def has_huge_pages() -> bool:
    return allocator._can_ask_for_huge_pages() or allocator._thp("always")


def test_a_program_restarts_itself_once_and_leaves_its_environment_as_it_was():
    if not allocator._can_ask_for_huge_pages():
        pytest.skip("this system gives no huge pages on request")
    (huge, cached, process, left), number = start(REPORT)
    assert (huge, cached) == ("True", str(can_cache()))
    assert process == str(number), "it is still the same process, as signals and supervisors need"
    assert left == "0", "child processes inherit nothing"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, [str(allocator._thp("always")), "False"]),
        ({"LD_PRELOAD": "libm.so.6"}, [str(allocator._thp("always")), "False"]),
        ({compiler.SWITCH: "0"}, [str(has_huge_pages()), "False"]),
        ({"CXX": "no-such", "PATH": "/nowhere"}, [str(has_huge_pages()), "False"]),
    ],
)
def test_settings_of_the_user_are_not_changed(setting, expected):
    words = start(REPORT, **setting)[0]
    assert words[:2] == expected
    assert words[3] == str(len(setting) if setting.keys() & set(OURS) else 0)


@pytest.mark.parametrize(
    "watch",
    [
        "import sys; sys.settrace(lambda *_: None)",
        "import sys; sys.setprofile(lambda *_: None)",
        "import sys; m = getattr(sys, 'monitoring', 0); m.use_tool_id(0, 'x') if m else sys.settrace(lambda *_: None)",
        "from pathlib import Path; import gptjax.machine.allocator as a; a.STATUS = Path('traced')",
    ],
)
def test_a_process_under_a_debugger_does_not_restart(watch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("traced").write_text("Name:\tpython\nTracerPid:\t4242\n")
    words = start(f"{watch}\n{REPORT.replace('print(', 'sys.settrace(None); print(', 1)}")[0]
    assert words[:2] == [str(allocator._thp("always")), "False"]
    Path("traced").write_text("TracerPid:\t0\n")
    if "traced" in watch and can_cache():
        assert start(f"{watch}\n{REPORT}")[0][1] == "True"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, ""),
        ({"GLIBC_TUNABLES": ""}, "GLIBC_TUNABLES is set"),
        ({"LD_PRELOAD": "x.so"}, "LD_PRELOAD is set"),
        ({"accelerator": "yes"}, "a GPU or TPU is used"),
    ],
)
def test_the_reason_against_a_restart_is_stated(environment, reason, monkeypatch):
    if allocator._glibc() is None:
        pytest.skip("needs Linux with glibc")
    monkeypatch.setattr(allocator, "has_accelerator", lambda environment: "accelerator" in environment)
    monkeypatch.setattr(allocator, "_is_watched", lambda: False)
    assert allocator.reason_not_to_restart(environment) == reason
    monkeypatch.setattr(allocator, "_is_watched", lambda: True)
    assert allocator.reason_not_to_restart(environment) == (
        reason or "a debugger, tracer or profiler watches this process"
    )


def test_the_library_is_kept_in_cache_dir(tmp_path):
    if not can_cache():
        pytest.skip("it needs glibc and a C++ compiler")
    settings = allocator._buffer_cache(str(tmp_path), 1)
    assert Path(settings[allocator.PRELOAD]).parent == compiled_folder(str(tmp_path))
    tmp_path.chmod(0o777)  # where another user could put a library
    elsewhere = Path(allocator._buffer_cache(str(tmp_path), 1)[allocator.PRELOAD])
    assert elsewhere.parent == compiled_folder(allocator.Config.cache_dir)


@pytest.mark.parametrize(
    ("environment", "processes", "expected"),
    [
        ({}, 1, 1),
        ({}, 3, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 1, 4),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 1, 2),
    ],
)
def test_processes_on_one_machine_share_the_memory_of_the_cache(environment, processes, expected, monkeypatch):
    if not can_cache():
        pytest.skip("it needs glibc and a C++ compiler")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = allocator._buffer_cache(allocator.Config.cache_dir, processes)
    assert int(settings[allocator.CACHE_BYTES]) == allocator.usable_memory() // (allocator.CACHE_SHARE * expected)


@pytest.mark.parametrize(("setting", "huge"), [("[always] madvise never", True), ("always madvise [never]", False)])
def test_kernel_wide_huge_pages_need_no_restart(tmp_path, monkeypatch, setting, huge):
    (tmp_path / "thp").write_text(setting)
    monkeypatch.setattr(allocator, "THP_SETTING", tmp_path / "thp")
    assert allocator._huge_pages() == {} and allocator.uses_huge_pages() == huge
    assert ("huge pages" in allocator.state()) == huge


@pytest.fixture
def restarts(monkeypatch, tmp_path):
    """Runs a command whose verbs do nothing, and returns what they restart with."""
    from gptjax.verbs import evaluate, sample, train

    monkeypatch.setattr(train, "run_train", lambda *_: 0)
    monkeypatch.setattr(evaluate, "run_evaluate", lambda *_: 0)
    monkeypatch.setattr(sample, "run_sample", lambda *_: 0)
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, list]:
        calls = []
        return main(list(args), lambda *settings: calls.append(settings)), calls

    return run


def test_only_train_and_sample_restart_after_their_arguments_are_read(restarts, capsys):
    own = ("--cache_dir", "own")
    assert restarts("train", "--data.path", "x", *own) == (0, [("own", 1)])
    several = ("--cluster.num_processes", "4", "--cluster.process_id", "0", "--cluster.coordinator", "localhost:1234")
    assert restarts("train", "--data.path", "x", *own, *several) == (0, [("own", 4)])
    assert restarts("train", "--data.path", "x", *own, NO_RESTART) == (0, [])
    assert restarts("sample", "--run_dir", "x", "--prompt", "a") == (0, [(allocator.Config.cache_dir, 1)])
    assert restarts("sample", NO_RESTART, "--run_dir", "x", "--prompt", "a") == (0, [])
    assert restarts("evaluate", "--run_dir", "x") == (0, [])
    for wrong in (
        ("train", "--data.pth", "x"),
        ("sample", "--run_dr", "x"),
        ("evaluate", "--run_dir", "x", NO_RESTART),
    ):
        assert restarts(*wrong) == (2, [])
    assert restarts("train", "--help") == (0, [])
    assert NO_RESTART in capsys.readouterr().out


def test_help_compiles_nothing(tmp_path):
    command = [sys.executable, "-m", "gptjax", "train", "--help"]
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert not list(tmp_path.iterdir())


LARGE = """
import ctypes, os
c = ctypes.CDLL(None)
c.free.argtypes = [ctypes.c_void_p]
c.realloc.argtypes, c.realloc.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
c.malloc_usable_size.argtypes, c.malloc_usable_size.restype = [ctypes.c_void_p], ctypes.c_size_t
c.gptjax_cached_bytes.restype = ctypes.c_size_t
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


def caching(program: str, cache_bytes: int = 2**40) -> list[str]:
    """Runs a program whose buffer cache may hold `cache_bytes`; returns its output."""
    if not can_cache():
        pytest.skip("it needs glibc and a C++ compiler")
    settings = allocator._buffer_cache(allocator.Config.cache_dir, 1)
    return start(LARGE + program, **settings | {allocator.CACHE_BYTES: str(cache_bytes)})[0]


def test_a_large_buffer_is_cached_for_the_next_request_of_its_size():
    words = caching("""
at = take(64 * MB)
ctypes.memset(at, 7, 64 * MB)
c.free(at)
print(c.gptjax_cached_bytes() // MB)
again = take(63 * MB)
print(again == at, ctypes.string_at(again, 1)[0], c.gptjax_cached_bytes())
both = take(63 * MB)
print(both != again)
""")
    assert words == ["64", "True", "7", "0", "True"]


def test_a_request_of_another_size_frees_the_cache():
    words = caching("""
c.free(written(128 * MB))
print(c.gptjax_cached_bytes() // MB, resident())
larger = written(640 * MB)
print(c.gptjax_cached_bytes(), resident())
c.free(larger)
smaller = take(256 * MB)
print(c.gptjax_cached_bytes(), resident())
""")
    assert words == ["128", "2", "0", "10", "0", "0"]


def test_a_buffer_that_is_freed_after_a_request_of_another_size_is_not_cached():
    words = caching("""
at = written(128 * MB)
other = written(192 * MB)
c.free(at)
print(c.gptjax_cached_bytes(), resident())
c.free(other)
print(c.gptjax_cached_bytes() // MB, resident())
""")
    assert words == ["0", "3", "192", "3"]


def test_the_cache_has_a_size_limit():
    words = caching(
        """
one, two = written(128 * MB), written(128 * MB)
c.free(one)
c.free(two)
print(c.gptjax_cached_bytes() // MB, resident())
""",
        cache_bytes=200 << 20,
    )
    assert words == ["128", "2"]


def test_a_request_waits_briefly_for_a_buffer_that_is_about_to_be_freed():
    words = caching("""
import threading

def is_waited_for():
    at = take(64 * MB)
    threading.Timer(0.001, c.free, [at]).start()
    return take(64 * MB) == at

print(any(is_waited_for() for _ in range(20)))  # on a busy machine the moment may be longer than the patience
""")
    assert words == ["True"]


def test_a_buffer_that_nobody_requests_for_long_is_freed():
    words = caching("""
both = written(128 * MB), written(128 * MB)
for at in both:
    c.free(at)
print(resident())
for _ in range(70):
    c.free(take(128 * MB))
print(resident(), c.gptjax_cached_bytes() // MB)
""")
    assert words == ["4", "2", "128"]


def test_the_rest_of_the_allocator_is_the_c_librarys():
    words = caching("""
large = take(64 * MB)
ctypes.memset(large, 5, 64 * MB)
print(large % 4096, c.malloc_usable_size(large) // MB, take(100, 4096) % 4096)
moved = c.realloc(large, 100)
print(ctypes.string_at(moved, 100) == bytes([5]) * 100, c.gptjax_cached_bytes() // MB)
print(c.malloc_usable_size(moved) >= 100)
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
    words = caching("""
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
print(len(wrong), c.gptjax_cached_bytes() <= 8 * 40 * MB)
""")
    assert words == ["0", "True"]


@pytest.mark.parametrize("name", ["with space", "with:colon"])
def test_a_folder_with_separators_in_its_name_is_not_used(name, tmp_path):
    assert start(REPORT, str(tmp_path / name))[0][1] == "False"
    assert start(REPORT, str(tmp_path / "plain"))[0][1] == str(can_cache())


def test_the_library_is_compiled_once(monkeypatch):
    if not can_cache():
        pytest.skip("it needs glibc and a C++ compiler")
    first = allocator._buffer_cache(allocator.Config.cache_dir, 1)
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("it was compiled again"))
    assert allocator._buffer_cache(allocator.Config.cache_dir, 1) == first


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


def test_freed_memory_is_returned_to_the_system():
    program = """
from gptjax.machine import allocator
def resident():
    [line] = [line for line in allocator.STATUS.read_text().splitlines() if "VmRSS" in line]
    return int(line.split()[1])
blocks = [bytearray(100_000) for _ in range(600)]
last, before = bytearray(100_000), resident()
del blocks
allocator.release_freed_memory()
print(before - resident())
"""
    if not allocator.STATUS.exists() or allocator._glibc() is None:
        pytest.skip("needs Linux with glibc")
    [released], _ = start(program)
    assert int(released) > 50_000, "of 58,594 KiB"
