"""The library of kernels in C++, which XLA calls by their names."""

import ctypes
import functools
import os
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
SOURCE = Path(__file__).with_name("kernels.cc")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
TARGETS = (
    *("linear", "weight_gradient", "mlp", "mlp_gradient", "layer_norm", "layer_norm_gradient"),
    *("attention", "attention_gradient", "cross_entropy", "cross_entropy_gradient"),
    *("lay_out", "few_rows", "cached_attention"),
)
_one_at_a_time = threading.Lock()


def begin() -> None:
    """Makes the library beside other work, where it will be needed; who asks for it waits for the end of that."""
    import jax

    if jax.default_backend() == "cpu":
        threading.Thread(target=ready, daemon=True).start()


def ready() -> bool:
    """Whether kernels can be called by name; makes the library and loads it when it is first asked."""
    return not _loaded().problem


def has_tiles() -> bool:
    """Whether kernels use AMX, by which they are faster than XLA's products in float32 too."""
    return _loaded().tiles


def state() -> str:
    """Says whether there are kernels, and if not, why."""
    if _loaded().problem:
        return f"none: {_loaded().problem}"
    return "AMX, for bfloat16 and float32" if has_tiles() else "AVX-512, for bfloat16"


class _Library(NamedTuple):
    problem: str
    """Why it is not there; empty: it is."""
    tiles: bool = False


def _loaded() -> _Library:
    with _one_at_a_time:
        return _load()


@functools.cache
def _load() -> _Library:
    import jax

    folder = jax.config.values["jax_compilation_cache_dir"]
    if os.environ.get(SWITCH) == "0":
        return _Library(f"{SWITCH}=0")
    if sys.platform != "linux" or not processor_flags() >= NEEDED:
        return _Library("they need Linux and a processor with AVX-512 and bfloat16")
    if not folder:
        return _Library("there is no folder for compiled programs")
    program = compiler.find()
    if not program:
        return _Library("no C++ compiler was found (c++, g++, clang++, or what CXX names); with one, it is faster")
    try:
        library = ctypes.CDLL(str(_built(program, Path(folder))))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return _Library(f"they could not be compiled: {next((line for line in said if 'error' in line), said[0])}")
    prepared = library.gptjax_prepare()
    if not prepared:
        return _Library("the system does not give this process the processor's tiles")
    for name in TARGETS:
        jax.ffi.register_ffi_target(f"gptjax_{name}", jax.ffi.pycapsule(library[f"gptjax_{name}"]), platform="cpu")
    return _Library("", tiles=prepared == 2)


def _built(program: str, folder: Path) -> Path:
    import jax

    options = (f"-I{jax.ffi.include_dir()}",)
    return compiler.library(program, SOURCE, HEADERS, options, metadata.version("jaxlib"), folder)
