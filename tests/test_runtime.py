import os
import subprocess
import sys

import pytest

from gptjax import runtime

REPORT = """
import os
from gptjax import runtime
runtime.restart_with_huge_pages()
print(runtime.uses_huge_pages(), os.getpid())
"""


def run(**environment) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name != runtime.TUNABLES}
    process = subprocess.Popen(
        [sys.executable, "-c", REPORT], env=clean | environment, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate()
    words = output.split()
    assert words[1] == str(process.pid), "it is still the same process, as signals and supervisors need"
    return words


def test_a_program_restarts_itself_once_with_huge_pages():
    if not runtime._has_huge_pages():
        pytest.skip("this system gives no huge pages on request")
    assert run()[0] == "True"


def test_a_setting_of_the_users_own_is_left_alone():
    assert run(GLIBC_TUNABLES="glibc.malloc.arena_max=4")[0] == "False"


@pytest.mark.parametrize(
    ("line", "known"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu sse2 avx2 amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu sse2 avx2 avx512f", False),
        ("model name\t: a processor that tells nothing", False),
    ],
)
def test_processors_that_multiply_bfloat16_are_known(tmp_path, monkeypatch, line, known):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(runtime, "CPU_INFO", tmp_path / "cpuinfo")
    assert runtime.multiplies_bfloat16() == known
    monkeypatch.setattr(runtime, "CPU_INFO", tmp_path / "nothing")
    assert not runtime.multiplies_bfloat16()


KEEP = """
from gptjax import runtime
runtime.restart_with_huge_pages()
print(runtime.keep_pages({size}))

def cleared():
    # minor page faults of this process while a buffer is written and given back, over and over
    import ctypes, resource
    c = ctypes.CDLL(None)
    c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    c.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        buffer = c.malloc(64 << 20)
        ctypes.memset(buffer, 1, 64 << 20)
        c.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(cleared())
"""


def kept(size: int, **environment) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if name != runtime.TUNABLES}
    program = [sys.executable, "-c", KEEP.format(size=size)]
    words = subprocess.run(program, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()
    return words[0] == "True", int(words[1])


def test_pages_of_small_buffers_are_kept():
    if not runtime._has_huge_pages():
        pytest.skip("this system gives no huge pages on request")
    small, faults = kept(64 << 20)
    large, more_faults = kept(2**50)
    assert (small, large) == (True, False)
    assert more_faults > 4 * faults, "each buffer is faulted in anew, or all but the first are there already"
    assert not kept(64 << 20, GLIBC_TUNABLES="glibc.malloc.arena_max=4")[0], "a setting of the user's own"


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
    monkeypatch.setattr(runtime, "OWN_GROUPS", tmp_path / "nothing")
    machine = runtime.usable_memory()
    monkeypatch.setattr(runtime, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(runtime, "GROUPS", tmp_path)
    assert runtime.usable_memory() == (expected or machine)
