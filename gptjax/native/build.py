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
    *("linear", "weight_gradient", "mlp", "mlp_gradient", "layer_norm", "layer_norm_gradient"),
    *("attention", "attention_gradient", "cross_entropy", "cross_entropy_gradient"),
    *("lay_out", "few_rows", "cached_attention"),
)


def ready() -> bool:
    """Whether kernels can be called by name; makes the library and loads it when it is first asked."""
    return _load() is None


def has_tiles() -> bool:
    """Whether the processor has AMX, by which kernels are faster than XLA's products in float32 too."""
    return "amx_bf16" in processor_flags()


def state() -> str:
    """Says whether there are kernels, and if not, why."""
    reason = _load()
    if reason is not None:
        return f"none: {reason}"
    return "AMX, for bfloat16 and float32" if has_tiles() else "AVX-512, for bfloat16"


@functools.cache
def _load() -> str | None:
    """Loads the library and returns None, or why that is not done."""
    import jax

    folder = jax.config.values["jax_compilation_cache_dir"]
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if sys.platform != "linux" or not processor_flags() >= NEEDED:
        return "they need Linux and a processor with AVX-512 and bfloat16"
    if not folder:
        return "there is no folder for compiled programs"
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        return "no C++ compiler was found (c++, g++, clang++, or what CXX names); with one, training is faster"
    try:
        library = ctypes.CDLL(str(_built(compiler, Path(folder))))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"they could not be compiled: {next((line for line in said if 'error' in line), said[0])}"
    if not library.gptjax_prepare():
        return "the system does not give this process the processor's tiles"
    for name in TARGETS:
        jax.ffi.register_ffi_target(f"gptjax_{name}", jax.ffi.pycapsule(library[f"gptjax_{name}"]), platform="cpu")
    return None


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
