"""Compiles, checks and loads the library of C++ kernels, which XLA calls by name."""

import ctypes
import functools
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from gptjax.machine.native import compiler
from gptjax.machine.native.compiler import SWITCH
from gptjax.machine.processor import processor_flags

NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"}
TILES = {"amx_tile", "amx_bf16", "amx_int8"}
WITHOUT_TILES = "-DGPTJAX_WITHOUT_TILES"
NO_TILES, USES_TILES = 0, 1
"""Return values of `gptjax_prepare`."""
SOURCE = Path(__file__).with_name("kernels.cc")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
TARGETS = (
    *("linear", "weight_gradient", "mlp", "mlp_gradient", "layer_norm", "layer_norm_gradient"),
    *("attention", "attention_gradient", "cross_entropy", "cross_entropy_gradient"),
    *("pack_weights", "small_batch_matmul", "cached_attention"),
)
_lock = threading.Lock()
_folder: Path | None = None


def set_folder(folder: Path) -> None:
    """Sets the private folder of the library, before the library is used; only the first call has an effect."""
    global _folder
    _folder = _folder or folder


def start_compiling(devices: int) -> None:
    """Compiles the library in a thread if a step on `devices` devices can use it; `ready` waits for the result."""
    import jax

    if jax.default_backend() == "cpu" and devices == 1:  # XLA cannot partition a kernel
        threading.Thread(target=ready, daemon=True).start()


def ready() -> bool:
    """Whether the kernels can be used; the first call compiles and loads the library."""
    return not _loaded().problem


def has_tiles() -> bool:
    """Whether the kernels use AMX, with which they are faster than XLA in float32 too."""
    return _loaded().tiles


def state(devices: int = 1) -> str:
    """Describes which kernels a step on `devices` devices uses, or why it uses none."""
    if devices > 1:
        return f"none: XLA partitions the step over {devices} devices"
    if _loaded().problem:
        return f"none: {_loaded().problem}"
    return "AMX, for bfloat16 and float32" if has_tiles() else "AVX-512, for bfloat16"


def reason_for_none() -> str:
    """Returns why there can be no kernels on this machine; empty: there can."""
    if compiler.level() == "0":
        return f"{SWITCH}=0"
    if sys.platform != "linux" or not processor_flags() >= NEEDED:
        return "they need Linux and a processor with AVX-512 and bfloat16"
    if not compiler.find():
        return "no C++ compiler was found (c++, g++, clang++, or the value of CXX); with one, steps are faster"
    return ""


class _Library(NamedTuple):
    problem: str
    """Why there are no kernels; empty: they are loaded."""
    tiles: bool = False


def _loaded() -> _Library:
    with _lock:
        return _load()


@functools.cache
def _load() -> _Library:
    import jax

    from gptjax.machine.native import check

    problem = reason_for_none()
    if problem or _folder is None:
        return _Library(problem or "there is no private folder for compiled programs")
    try:
        library, tiles = _prepared_library(_folder)
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return _Library(f"they could not be compiled: {next((line for line in output if 'error' in line), output[0])}")
    wrong = check.wrong_kernel(library, float32=tiles)
    if wrong:
        problem = f"they compute wrong numbers here ({wrong}), so XLA is used for everything"
        print(f"gptjax: kernels are turned off: {problem}", file=sys.stderr)
        return _Library(problem)
    for name in TARGETS:
        jax.ffi.register_ffi_target(f"gptjax_{name}", jax.ffi.pycapsule(library[f"gptjax_{name}"]), platform="cpu")
    return _Library("", tiles)


def _prepared_library(folder: Path) -> "tuple[ctypes.CDLL, bool]":
    """Returns the library, and whether it uses AMX: if the processor has it and the system permits it."""
    if processor_flags() >= TILES and compiler.level() == "auto":
        library = ctypes.CDLL(str(_built(folder)))
        if library.gptjax_prepare() == USES_TILES:
            return library, True
    library = ctypes.CDLL(str(_built(folder, WITHOUT_TILES)))
    return library, library.gptjax_prepare() == USES_TILES


def _built(folder: Path, *options: str) -> Path:
    import jax

    program = compiler.find()
    assert program is not None
    include = f"-I{jax.ffi.include_dir()}"
    return compiler.library(program, SOURCE, HEADERS, (include, *options), metadata.version("jaxlib"), folder)
