import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiling takes most of the suite's time, and far less at this level; processes that tests start inherit it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

from gptjax.machine import compile_cache
from gptjax.machine.native import build, compiler

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs are compiled once per machine; later runs, and the other worker of this one, read them.
CACHE = Path(__file__).parents[1] / ".pytest_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE / "compiled"))
compiler.OPTIONS += tuple(filter(None, [os.environ.get("GPTJAX_TEST_OPTIONS")]))
if folder := compile_cache.usable_folder(str(CACHE)):
    build.keep_in(folder)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
