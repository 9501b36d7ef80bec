import gc
import os
import zlib
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiling takes most of the suite's time, and far less at this level; processes that tests start inherit it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

from gptjax.machine import compile_cache
from gptjax.machine.native import build, compiler

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs are compiled once per machine; later runs, and the other worker of this one, read them.
CACHE = Path(__file__).parents[1] / ".pytest_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
# XLA's own caches would make the path of the folder part of each program's key.
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
if option := os.environ.get("GPTJAX_TEST_OPTION"):  # for the compiler of kernels, which may name a header of tests
    header = Path(__file__).with_name("native") / "emulated_tiles.h"
    compiler.OPTIONS += (option, f"-DGPTJAX_TEST=0x{zlib.crc32(header.read_bytes()):x}")
if folder := compile_cache.usable_folder(str(CACHE / "shared")):  # which processes of tests read too
    build.set_folder(folder)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Frees compiled programs before a long run of tests has more memory mappings than Linux allows (65,530)."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
