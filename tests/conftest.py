import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiling takes most of the suite's time, and far less at this level; processes that tests start inherit it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs are compiled once per machine; later runs, and the other worker of this one, read them.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
