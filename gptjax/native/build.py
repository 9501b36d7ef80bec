"""The library of kernels in C++: compiled where it runs, for the processor it runs on, and kept."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from gptjax.files import publish, temporary_name
from gptjax.runtime import is_sound, processor_flags, sign

SWITCH = "GPTJAX_NATIVE"
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"}
SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".h", ".cc"))
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
TARGETS = (
    *("linear", "linear_gelu", "linear_gelu_gradient", "weight_gradient"),
    *("attention", "attention_gradient"),
    *("lay_out", "few_rows", "cached_attention"),
)


@functools.cache
def ready() -> bool:
    """Whether kernels can be called by name; makes the library and loads it when it is first asked."""
    return not state()[1]


@functools.cache
def state() -> tuple[str, bool]:
    """Says in words whether there are kernels, and else why not; and whether it is so that there are none."""
    import jax

    folder = jax.config.values["jax_compilation_cache_dir"]
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get(SWITCH) == "0":
        return f"off: {SWITCH}=0", True
    if sys.platform != "linux" or not processor_flags() >= NEEDED:
        return "none: they need Linux and a processor with AVX-512 and bfloat16", True
    if not folder:
        return "none: there is no folder for compiled programs", True
    if not compiler:
        return "none: no C++ compiler was found (c++, or CXX); with g++ steps take about half of the time", True
    try:
        library = ctypes.CDLL(str(_built(compiler, Path(folder))))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"none: they could not be compiled: {said.strip().splitlines()[0]}", True
    if not library.gptjax_prepare():
        return "none: the system gives this process no tiles", True
    for name in TARGETS:
        jax.ffi.register_ffi_target(f"gptjax_{name}", jax.ffi.pycapsule(library[f"gptjax_{name}"]), platform="cpu")
    return "by AMX" if "amx_bf16" in processor_flags() else "by AVX-512", False


def _built(compiler: str, folder: Path) -> Path:
    """The library for these sources, this compiler and this jaxlib, made if it is not there or is damaged.

    Raises:
        OSError: It cannot be written.
        SubprocessError: The compiler failed.
    """
    import jax

    parts = [path.read_bytes() for path in SOURCES]
    parts += [text.encode() for text in (*OPTIONS, compiler, metadata.version("jaxlib"))]
    path = folder / f"kernels-{hashlib.sha256(bytes(1).join(parts)).hexdigest()[:16]}.so"
    if not is_sound(path):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        [main] = [source for source in SOURCES if source.suffix == ".cc"]
        command = [compiler, *OPTIONS, f"-I{jax.ffi.include_dir()}", str(main), "-o", str(temporary)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        publish(temporary, path)
        sign(path)
    return path
