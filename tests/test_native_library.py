"""Compilation, instruction-set levels and checks of the library of kernels."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.machine import compile_cache
from gptjax.machine.native import build, check, compiler
from tests.native.kernels import need

ROOT = Path(__file__).parents[1]
INCLUDE = f"-I{jax.ffi.include_dir()}"
TILES = f'-DGPTJAX_TILES_HEADER="{ROOT / "tests" / "native" / "emulated_tiles.h"}"'


@pytest.fixture
def folder(tmp_path):
    return compile_cache.compiled_folder(str(tmp_path))


@pytest.fixture(scope="module")
def library():
    need()
    return ctypes.CDLL(str(build._built(build._folder, build.WITHOUT_TILES)))


def test_the_kernels_compute_what_numpy_does(library):
    assert check.wrong_kernel(library, float32=True) == ""
    assert {case.name for case in check.cases((check.BFLOAT16,))} == set(build.TARGETS), "each kernel has a case"


def assert_bits_do_not_depend_on_threads(library) -> None:
    for case in check.cases((check.BFLOAT16, check.FLOAT32)):
        one, *others = (
            check.call(library, case.name, case.arguments, case.results, case.options, threads)[: len(case.expected)]
            for threads in (1, 2, 3, 16, 64)
        )
        for other in others:
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)), case.name


def test_bits_do_not_depend_on_the_number_of_threads(library):
    assert_bits_do_not_depend_on_threads(library)


@pytest.mark.parametrize("name", ["linear", "weight_gradient", "mlp", "mlp_gradient", "cross_entropy_gradient"])
@pytest.mark.parametrize(("threads", "helpers"), [(2, 1), (16, 15), (64, 31)])
def test_work_is_divided_among_many_threads(name, threads, helpers, library):
    """Uses the size of a small step: 2,048 rows, in blocks of 256 on two threads."""
    N, D, F = 2048, 96, 288
    x, w, dy = np.zeros((N, D), np.float32), np.zeros((D, F), np.float32), np.zeros((N, F), np.float32)
    x, dy = x.astype(check.BFLOAT16), dy.astype(check.BFLOAT16)
    vector, room = check.NONE, ((2**23,), check.BFLOAT16)
    stream, weight = ((N, D), check.FLOAT32), ((D, F), check.FLOAT32)
    parts = (((N,), check.FLOAT32),) * 3
    loss = {"vocab_size": np.int64(F), "smoothing": np.float32(0), "z_loss": np.float32(0)}
    arguments, results, options = {
        "linear": ((x, w, vector, vector), (((N, F), check.FLOAT32), room), {"columns": np.bool_(False)}),
        "weight_gradient": ((x, dy), (weight, ((F,), check.FLOAT32), room), {}),
        "mlp": ((x, w, vector, w, vector, vector), (stream, room), {}),
        "mlp_gradient": (
            (x, w, vector, w, x),
            (((N, D), check.BFLOAT16), weight, ((F,), check.FLOAT32), weight, room),
            {},
        ),
        "cross_entropy_gradient": (
            (x, w.T, np.zeros(N, np.int32)),
            (*parts, stream, ((F, D), check.FLOAT32), room),
            loss,
        ),
    }[name]
    _, found = check.call_and_count(library, name, arguments, results, options, threads)
    assert found >= min(helpers, 26 if name == "weight_gradient" else 63)  # 3 x 9 blocks of 32 x 32


@pytest.mark.parametrize("case", list(check.cases((check.BFLOAT16,))), ids=lambda case: case.name)
def test_a_kernel_that_computes_wrongly_is_found(case, library, monkeypatch):
    right = check.call

    def sixteen_zeros(library, name, *args):
        results = right(library, name, *args)
        if name == case.name:
            flat = results[0].reshape(-1)
            flat[flat.size // 3 :][:16] = 0
        return results

    monkeypatch.setattr(check, "call", sixteen_zeros)
    assert check.wrong_kernel(library, float32=False).startswith(f"{case.name} of ")


def test_a_kernel_that_rejects_its_arguments_is_found(library):
    with pytest.raises(check.KernelError, match="linear: buffers do not fit one another"):
        check.call(
            library,
            "linear",
            (check.NONE,) * 4,
            (((32, 32), check.FLOAT32), ((0,), check.BFLOAT16)),
            {"columns": np.bool_(False)},
        )


WITHOUT_MEMORY = """
import ctypes, resource, sys
import numpy as np
from gptjax.machine.native import check
library = ctypes.CDLL(sys.argv[1])
N, D, F = 256, 32, 2**18  # its hidden layer takes 128 MB
x, w = np.ones((N, D), np.float32).astype(check.BFLOAT16), np.zeros((D, F), np.float32)
results = ((N, D), check.FLOAT32), ((2 * D * F,), check.BFLOAT16)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
for threads in (1, 2):
    try:
        check.call(library, "mlp", (x, w, check.NONE, w, check.NONE, check.NONE), results, {}, threads)
    except check.KernelError as error:
        print(error)
"""


def test_a_kernel_without_memory_is_an_error_and_ends_nothing(library):
    command = [sys.executable, "-c", WITHOUT_MEMORY, library._name]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["mlp: not enough memory for a kernel"] * 2, done.stderr


def test_wrong_kernels_are_turned_off_with_one_line(monkeypatch, capsys):
    need()
    monkeypatch.setattr(check, "wrong_kernel", lambda *_, **__: "mlp of bfloat16: 16 of 10,240 numbers are wrong")
    loaded = build._load.__wrapped__()
    assert "mlp of bfloat16: 16 of 10,240 numbers are wrong" in loaded.problem
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("gptjax: kernels are turned off: ")


def test_avx512_is_used_if_the_system_denies_amx(monkeypatch):
    need()
    tried, system = [], {}

    class Library:
        def __init__(self, options):
            tried.append(options)

        def gptjax_prepare(self):
            return build.USES_TILES if system["gives"] and tried[-1] == with_tiles else build.NO_TILES

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(build, "_built", lambda folder, *options: options)
    monkeypatch.setattr(build, "processor_flags", lambda: build.NEEDED | build.TILES)
    with_tiles, without = "()", f"{(build.WITHOUT_TILES,)}"
    for gives, level, expected, used in (
        (True, "auto", [with_tiles], True),
        (False, "auto", [with_tiles, without], False),
        (True, "avx512", [without], False),
    ):
        monkeypatch.setenv(compiler.SWITCH, level)
        system["gives"] = gives
        tried.clear()
        assert build._prepared_library(Path())[1] == used and tried == expected


PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from gptjax.machine import compile_cache
from gptjax.machine.native import build, compiler
compiler.OPTIONS = (*compiler.OPTIONS, *sys.argv[2:])
compile_cache.start(sys.argv[1])
from gptjax.ops.linear import mlp
x, w = jnp.ones((64, 64), "bfloat16"), jnp.ones((64, 64), "bfloat16")
lowered = jax.jit(lambda x, w: mlp(x, w, None, w, None)).lower(x, w)
print("gptjax_mlp" in lowered.as_text(), build.state())
"""


def state_of(folder: Path, *options: str, **environment: str) -> str:
    """Starts a process; returns whether it uses kernels, and its message about them."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ((), {"GPTJAX_NATIVE": "0"}, "False none: GPTJAX_NATIVE=0"),
        ((), {"PATH": "/nowhere", "CXX": ""}, "False none: no C++ compiler was found"),
        (("-DXLA_FFI_API_C_API_H_", "-no-such-option"), {}, "False none: they could not be compiled"),
        ((), {"GPTJAX_NATIVE": "1"}, "gptjax.errors.UserError: GPTJAX_NATIVE='1' must be one of auto, avx512, 0"),
    ],
)
def test_without_kernels_the_reason_is_stated_and_xla_computes(tmp_path, options, environment, expected):
    need()
    assert state_of(tmp_path, *options, **environment).startswith(expected)
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.parametrize("value", ["1", "AVX512", "off", ""])
def test_a_wrong_level_is_an_error_at_once(value, monkeypatch):
    monkeypatch.setenv(compiler.SWITCH, value)
    with pytest.raises(UserError, match=r"must be one of auto, avx512, 0"):
        compile_cache.start()


FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "compiler 1.2.3"; exit; fi
echo once >> {log}
while [ "$1" != -o ]; do shift; done
sh -c 'echo $$ > {pid}; sleep {seconds}'
echo new > "$2"
"""


def fake_compiler(tmp_path, seconds: float = 0) -> Path:
    """A program that counts how often it compiles."""
    path = tmp_path / "compiler"
    path.write_text(FAKE.format(log=tmp_path / "log", pid=tmp_path / "pid", seconds=seconds))
    path.chmod(0o700)
    return path


def built(program: Path, folder: Path) -> Path:
    return compiler.library(str(program), build.SOURCE, build.HEADERS, (), "", folder)


def test_a_library_is_compiled_again_for_another_processor_or_compiler(tmp_path, folder, monkeypatch):
    program = fake_compiler(tmp_path)
    path = built(program, folder)
    assert path.read_text() == "new\n" and built(program, folder) == path
    assert path.name.startswith(f"kernels-{compiler.processor.identity()}-compiler_1.2.3-") and path.suffix == ".so"
    program.write_text(program.read_text().replace("1.2.3", "1.2.4"))
    compiler._version.cache_clear()
    newer = built(program, folder)
    assert "compiler_1.2.4" in newer.name and newer != path
    monkeypatch.setattr(compiler.processor, "identity", lambda: "x86_64-of-another")
    assert "x86_64-of-another" in built(program, folder).name


def test_a_damaged_library_is_compiled_again(tmp_path, folder):
    program = fake_compiler(tmp_path)
    path = built(program, folder)
    path.write_text("damaged\n")
    assert built(program, folder) == path and path.read_text() == "new\n"
    assert (tmp_path / "log").read_text().count("once") == 2


def test_two_processes_that_need_the_same_library_compile_it_once(tmp_path, folder):
    program = fake_compiler(tmp_path, seconds=0.5)
    code = (
        "import sys; from pathlib import Path; from gptjax.machine.native import build, compiler;"
        "print(compiler.library(sys.argv[1], build.SOURCE, build.HEADERS, (), '', Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(program), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in both}
    assert len(paths) == 1 and Path(paths.pop()).read_text() == "new\n"
    assert (tmp_path / "log").read_text().count("once") == 1


def test_a_process_that_ends_stops_its_compiler_and_leaves_nothing(tmp_path, folder):
    program = fake_compiler(tmp_path, seconds=600)
    code = (
        "import sys, threading, time; from pathlib import Path; from gptjax.machine.native import build, compiler;"
        "compile = lambda: compiler.library(sys.argv[1], build.SOURCE, build.HEADERS, (), '', Path(sys.argv[2]));"
        "threading.Thread(target=compile, daemon=True).start();"
        "pid = Path(sys.argv[1]).with_name('pid')\nwhile not (pid.exists() and pid.read_text()): time.sleep(0.01)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(program), str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )
    assert not list(folder.glob("*.so")) and not list(folder.glob("*.tmp-*"))
    deadline = time.monotonic() + 60
    while is_alive(int((tmp_path / "pid").read_text())):  # what the compiler had started
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def compiled(tmp_path, program: str, *options: str) -> str:
    """A library of the kernels, by another compiler or with other options."""
    path = tmp_path / "kernels.so"
    options = (*compiler.OPTIONS, "-O1", str(build.SOURCE), INCLUDE, *options, "-o", str(path))
    subprocess.run([program, *options], check=True)
    return str(path)


CHECK = """
import ctypes, sys
from gptjax.machine.native import check
from tests.test_native_library import assert_bits_do_not_depend_on_threads
library = ctypes.CDLL(sys.argv[1])
print(check.wrong_kernel(library, float32=True))
assert_bits_do_not_depend_on_threads(library)
"""


def checked(path: str, **environment: str) -> str:
    """Checks a library in a separate process; returns the error it finds."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK, path],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    return (done.stdout + done.stderr).strip()


@pytest.mark.slow
def test_the_kernels_are_right_with_clang(tmp_path):
    need()
    if not (clang := compiler.shutil.which("clang++")):
        pytest.skip("needs clang++")
    assert checked(compiled(tmp_path, clang)) == ""


@pytest.mark.slow
def test_the_code_for_tiles_is_right_with_emulated_tiles(tmp_path):
    need()
    assert checked(compiled(tmp_path, "c++", TILES)) == ""


@pytest.mark.slow
def test_emulated_tiles_pass_the_tests_of_kernels():
    """Includes float32, which only tiles support."""
    need()
    files = [ROOT / "tests" / name for name in ("test_native.py", "test_native_projection.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, "GPTJAX_TEST_OPTION": TILES},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
def test_tests_of_kernels_pass_at_the_lower_level():
    need("float32")
    files = [ROOT / "tests" / name for name in ("test_native.py", "test_native_projection.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, compiler.SWITCH: "avx512"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [(), (TILES,)], ids=["avx512", "tiles"])
def test_sanitizers_find_nothing(tmp_path, tiles):
    need()
    sanitizers = [
        subprocess.run(["c++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(path).is_absolute() for path in sanitizers):
        pytest.skip("needs the sanitizers of GCC")
    options = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", *tiles)
    path = compiled(tmp_path, "c++", *options)
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc", "LD_PRELOAD": " ".join(sanitizers)}
    assert checked(path, **environment) == ""


EXPONENTIAL = """
#include "exponential.h"
extern "C" void exponential(const float* x, float* y) { _mm512_storeu_ps(y, gptjax::Exp(_mm512_loadu_ps(x))); }
"""


def test_the_exponential_has_the_accuracy_of_its_comment(tmp_path):
    need()
    source = tmp_path / "exponential.cc"
    source.write_text(EXPONENTIAL)
    path = tmp_path / "exponential.so"
    command = [compiler.find(), *compiler.OPTIONS, f"-I{build.SOURCE.parent}", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    for lowest, highest, error in ((-1, 1, 2e-7), (-10, -1, 7e-7), (-80, -10, 5e-6)):
        x = np.linspace(lowest, highest, 16 * 200, dtype=np.float32)
        y = np.zeros_like(x)
        for at in range(0, x.size, 16):
            library.exponential(ctypes.c_void_p(x[at:].ctypes.data), ctypes.c_void_p(y[at:].ctypes.data))
        assert np.max(np.abs(y / np.exp(x.astype(np.float64)) - 1)) < error
    x = np.full(16, -1e30, np.float32)
    library.exponential(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data))
    assert (y[:16] == 0).all()


def test_a_step_on_several_devices_compiles_no_kernels_and_says_so(monkeypatch):
    started = []
    monkeypatch.setattr(build.threading, "Thread", lambda **options: started.append(options) or options["target"])
    monkeypatch.setattr(build, "ready", type("Ready", (), {"start": lambda: None}))
    build.start_compiling(4)
    assert not started and build.state(4) == "none: XLA partitions the step over 4 devices"
    build.start_compiling(1)
    assert len(started) == 1
