"""Losses of 50 steps with every fast path, without any, and without each one: `python bench/curves.py`.

Prints the largest difference to the plain program, and draws the curves to docs/figures/curves.png. The model is the
smallest of the bench, with a few more rows, on the bytes of Python's own modules.
"""

import argparse
import ast
import contextlib
import inspect
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from gptjax.batches.pretraining import Batch
from gptjax.config.model import ModelConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.run import Config
from gptjax.config.train import TrainConfig
from gptjax.machine.allocator import restart
from gptjax.machine.compile_cache import start
from gptjax.ops import attention, cross_entropy, elementwise, linear
from gptjax.ops.plain_attention import attention_reference
from gptjax.training.step import init_state, make_train_step

STEPS = 50
MODEL = ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=256)
BATCH_SIZE = 64  # large enough for XLA to fuse norms, and attention with its matmuls
FIGURE = Path(__file__).parents[1] / "docs/figures/curves.png"


def self_attention_reference(spec, qkv_BTGEC, *options):
    return attention_reference(*attention.split_heads(qkv_BTGEC), spec, *options)


# Each fast path: where it is used, by which name, and what it is held to.
PLAIN = {
    "C++ kernels": [("gptjax.ops.kernels.unsupported", lambda *sizes: "left out")],
    "linear layers": [
        ("gptjax.ops.linear.linear", linear.linear_reference),
        ("gptjax.model.block.mlp", linear.mlp_reference),
    ],
    "attention": [("gptjax.model.attention.self_attention", self_attention_reference)],
    "loss": [("gptjax.model.loss.cross_entropy", cross_entropy.cross_entropy_reference)],
    "layer norm": [
        ("gptjax.model.norms.layer_norm", elementwise.layer_norm_reference),
        (
            "gptjax.model.norms.layer_norm_with_residual",
            lambda x, *args: (x, elementwise.layer_norm_reference(x, *args)),
        ),
    ],
    "embedding": [("gptjax.model.gpt.embedding", lambda w_VD, tokens_BT: w_VD[tokens_BT])],
    "order of the optimizer": [("gptjax.training.step.schedule_each_after", lambda x, earlier: x)],
}


@contextlib.contextmanager
def without(names: list[str]) -> Iterator[None]:
    """Puts the plain form in place of the named fast paths."""
    with contextlib.ExitStack() as stack:
        for name in names:
            for target, function in PLAIN[name]:
                stack.enter_context(mock.patch(target, function))
        yield


def curve(dtype: str, plain: list[str]) -> tuple[np.ndarray, float]:
    """Losses of the steps, and the median time of a step in milliseconds."""
    config = Config(
        model=MODEL,
        optim=OptimConfig(learning_rate=1e-3, min_learning_rate=1e-4, beta2=0.99, warmup_steps=10),
        train=TrainConfig(num_steps=STEPS, batch_size=BATCH_SIZE, compute_dtype=dtype),
    )
    text = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, typing)).encode()
    stream = np.frombuffer(text, np.uint8).astype(np.int32)
    T, losses, times = MODEL.block_size, [], []
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (1, BATCH_SIZE, T))
    with without(plain):
        state = jax.jit(lambda: init_state(config))()
        step = jax.jit(make_train_step(config), donate_argnums=0)
        for number in range(STEPS):
            starts = np.random.default_rng(number).integers(0, len(stream) - T - 1, BATCH_SIZE)
            windows = np.stack([stream[s : s + T + 1] for s in starts])[None]
            batch = jax.device_put(Batch(windows[..., :-1], windows[..., 1:], None, positions))
            started = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            times.append(time.perf_counter() - started)
    return np.array(losses), 1e3 * float(np.median(times[5:]))


def main() -> None:
    start()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    print("| dtype | program | ms per step | loss of step 50 | largest difference to the plain program |")
    print("|---|---|---|---|---|")
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        plain, plain_time = curve(dtype, list(PLAIN))
        print(f"| {dtype} | plain | {plain_time:.1f} | {plain[-1]:.5f} | |", flush=True)
        for name in ("all fast paths", *PLAIN):
            losses, milliseconds = curve(dtype, [] if name == "all fast paths" else [name])
            label = name if name == "all fast paths" else f"without: {name}"
            difference = np.abs(losses - plain).max()
            print(f"| {dtype} | {label} | {milliseconds:.1f} | {losses[-1]:.5f} | {difference:.1e} |", flush=True)
            if name == "all fast paths":
                axis.plot(losses, label="fast paths", linewidth=3, alpha=0.5)
        axis.plot(plain, "k--", label="plain", linewidth=1)
        axis.set(title=dtype, xlabel="step")
        axis.legend()
    axes[0].set_ylabel("loss, nats per byte")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120, bbox_inches="tight")
    print(f"drawn: {FIGURE.relative_to(Path.cwd())}")


if __name__ == "__main__":
    restart()
    main()
