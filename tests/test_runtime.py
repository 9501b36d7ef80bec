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
