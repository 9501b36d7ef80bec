"""Times gptjax: `python bench/ours.py train WORK DTYPE STEPS` `generate SEQUENCES DTYPE REPEATS`
or `whole PRESET DTYPE REPEATS`; prints JSON."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from work import GENERATION, NEW_TOKENS, PROMPT_TOKENS, TRAINING, WHOLE_STEPS, Training

from gptjax.machine.allocator import restart
from gptjax.machine.compile_cache import start


def train(name: str, dtype: str, steps: int) -> dict:
    start()
    import jax
    import numpy as np

    from gptjax.batches.prefetch import prefetch
    from gptjax.batches.pretraining import Batch
    from gptjax.config.model import ModelConfig
    from gptjax.config.optim import OptimConfig
    from gptjax.config.run import Config
    from gptjax.config.train import TrainConfig
    from gptjax.training.step import init_state, make_train_step

    work = TRAINING[name]
    on_cpu = jax.default_backend() == "cpu"
    config = Config(
        model=ModelConfig(
            n_layer=work.n_layer,
            n_head=work.n_head,
            n_embd=work.n_embd,
            block_size=work.block_size,
            vocab_size=work.vocab_size,
            vocab_multiple=1 if on_cpu or work.vocab_size < 1000 else 128,
            **modern_options(work),
        ),
        optim=OptimConfig(learning_rate=1e-3, min_learning_rate=1e-4, beta2=0.99),
        train=TrainConfig(num_steps=steps + 3, batch_size=work.batch_size, compute_dtype=dtype),
    )
    shape = (1, work.batch_size, work.block_size)

    def make_batch(step: int) -> Batch:
        inputs = np.random.default_rng(step).integers(0, work.vocab_size, shape, dtype=np.int32)
        positions = np.broadcast_to(np.arange(work.block_size, dtype=np.int32), shape)
        return Batch(inputs, np.roll(inputs, -1, axis=-1), None, positions)

    state = jax.jit(lambda: init_state(config))()
    batches = prefetch(make_batch, 0, steps + 3)
    traced = jax.jit(make_train_step(config), donate_argnums=0).lower(state, make_batch(0))
    step: Any = traced.compile()
    times, losses = [], []
    for batch in batches:
        started = time.perf_counter()
        state, metrics = step(state, jax.device_put(batch))
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - started)
    if not on_cpu:  # no fetch between steps: as the trainer runs, which reads a step's metrics one step later
        times = _pipelined(step, state, make_batch, steps)
    return {"times": times[-steps:], "work": work.tokens, "losses": losses, "peak_bytes": _peak_bytes()}


def modern_options(work: Training) -> dict[str, Any]:
    """Options of the block of Llama; none for GPT-2."""
    if not work.modern:
        return {}
    block = {"norm": "rms", "activation": "silu", "gated": True, "positions": "rope", "bias": False}
    return block | {"mlp_width": work.mlp_width, "n_kv_head": work.n_kv_head}


def _pipelined(step, state, make_batch, steps: int) -> list[float]:
    import jax

    batches = [jax.device_put(make_batch(i)) for i in range(4)]
    jax.block_until_ready(batches)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for i in range(steps):
            state, metrics = step(state, batches[i % 4])
        jax.block_until_ready(metrics)
        times += [(time.perf_counter() - started) / steps]
    return times


def generate(sequences: str, dtype: str, repeats: int) -> dict:
    start()
    import jax
    import numpy as np

    from gptjax.config.model import ModelConfig
    from gptjax.config.verbs.sample import SampleConfig
    from gptjax.generation.decode import generate
    from gptjax.model.gpt import init_params

    work = GENERATION
    model = ModelConfig(vocab_size=work.vocab_size)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    precision = {"quantize": "int8"} if dtype == "int8" else {"compute_dtype": dtype}
    options = SampleConfig(max_new_tokens=NEW_TOKENS, temperature=0.0, **precision)
    prompts = list(np.random.default_rng(0).integers(0, work.vocab_size, (int(sequences), PROMPT_TOKENS), np.int32))
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        out = generate(model, params, prompts, options)
        times.append(time.perf_counter() - started)
    assert all(len(row[0]) == NEW_TOKENS for row in out)
    return {"times": times[1:], "work": int(sequences) * NEW_TOKENS, "peak_bytes": _peak_bytes()}


def whole(preset: str, _dtype: str, repeats: int) -> dict:
    """Seconds from the start of the process to its end, checkpoints and samples included."""
    root, times = Path(__file__).parents[1], []
    text = os.environ.get("BENCH_TEXT", str(root / "../shared/data/tinyshakespeare.txt"))
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(root / "train.py"), str(root / f"configs/{preset}.yaml")]
            command += ["--data.path", text, "--run_dir", folder + "/run", "--cache_dir", folder + "/cache"]
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - started)
            rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    return {"times": times, "work": WHOLE_STEPS * TRAINING["small"].tokens, "peak_bytes": peak, "val_loss": losses[-1]}


def _peak_bytes() -> int:
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return device.memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    restart()
    verb, name, dtype, count = sys.argv[1:]
    print(json.dumps({"train": train, "generate": generate, "whole": whole}[verb](name, dtype, int(count))))
