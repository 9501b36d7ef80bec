"""`gptjax profile`."""

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

import jax

from gptjax.config.run import Config
from gptjax.config.verbs.profile import ProfileConfig
from gptjax.errors import UserError
from gptjax.files import check_writable
from gptjax.machine import compile_cache
from gptjax.report import cost
from gptjax.report.trace import by_kind, descriptions, measured
from gptjax.training.setup import build
from gptjax.training.trainer import device_batches, follow_model

WARM_UP = 2
"""Number of steps before the trace begins."""
ROWS = 15


def run_profile(config: Config, options: ProfileConfig) -> int:
    """Traces steps of a new run in a temporary folder, and prints their time by operation.

    Raises:
        UserError: The config or its data is invalid, or the folder for the trace exists.
    """
    out = Path(options.out).expanduser().absolute()
    if options.out:
        if out.exists():
            raise UserError(f"out={options.out}: exists already; name a new folder")
        check_writable("out", next(folder for folder in out.parents if folder.exists()) / out.name)
    compile_cache.start(config.cache_dir)
    with tempfile.TemporaryDirectory(prefix="gptjax-profile-") as folder:
        run_dir, trace = Path(folder) / "run", Path(folder) / "trace"
        seconds, tokens, flops, program = _trace(config, run_dir, trace, options.steps)
        found = measured(trace)
        if options.out:
            shutil.copytree(trace, out)
    each = seconds / options.steps
    print(f"step        {1000 * each:.1f} ms, {tokens / each:,.0f} tokens/s, on {jax.device_count()} devices")
    if peak := cost.peak_flops():
        print(f"MFU         {tokens / each * flops / peak:.1%}")
    if not found:
        print("the profiler of this device recorded no operations")
        return 0
    times, counts = max(found.values(), key=lambda pair: pair[0].total())
    total, described = times.total(), descriptions(program)
    print(f"\n{'kind of operation':28}  {'share':>6}  {'ms per step':>11}")
    for kind, nanoseconds in by_kind(times, described).most_common():
        print(f"{kind:28}  {nanoseconds / total:6.1%}  {nanoseconds / 1e6 / options.steps:11.2f}")
    print(f"\n{'operation':44}  {'share':>6}  {'ms per step':>11}  {'runs per step':>13}")
    for name, nanoseconds in times.most_common(ROWS):
        runs = counts[name] / options.steps
        shown = f"{name} {described.get(name, '')}"[:44]
        print(f"{shown:44}  {nanoseconds / total:6.1%}  {nanoseconds / 1e6 / options.steps:11.2f}  {runs:13.1f}")
    if options.out:
        print(f"\n{options.out}: open it with TensorBoard's profile plugin, or the .trace.json.gz in ui.perfetto.dev")
    return 0


def _trace(config: Config, run_dir: Path, trace: Path, steps: int) -> tuple[float, int, float, str]:
    """Writes a trace; returns the seconds of its steps, the tokens of a step, the FLOPs of a token, and the compiled
    program.
    """
    train = dataclasses.replace(config.train, num_steps=WARM_UP + steps, num_epochs=0.0)
    parts, state, _ = build(dataclasses.replace(config, run_dir=str(run_dir), train=train), run_dir)
    batches = device_batches(parts, 0, WARM_UP + steps)
    flops = cost.flops_per_token(parts.config.model, state.params) if parts.config.finetune.train == "all" else 0.0
    try:
        follow_model(parts, state)
        batch = next(batches)
        step = parts.train_step.lower(state, batch).compile()
        state, metrics = step(state, batch)
        for _ in range(WARM_UP - 1):
            follow_model(parts, state)
            state, metrics = step(state, next(batches))
        jax.block_until_ready(state)
        with jax.profiler.trace(str(trace)):
            began = time.monotonic()
            for _ in range(steps):
                follow_model(parts, state)
                state, metrics = step(state, next(batches))
            jax.block_until_ready((state, metrics))
            seconds = time.monotonic() - began
    finally:
        batches.close()
        parts.checkpoints.close()
    return seconds, parts.tokens_per_step, flops, step.as_text()
