"""Prints how the loss of small models changes on texts that are longer than those of their training.

Each position method trains on windows of 64 bytes of Python's standard library, and is evaluated on windows of 64,
128 and 512 bytes of other files: the mean loss of the last 32 positions of a window, whose context is longest.
Scalings of rope and windows are applied to the model that was trained without them.

    python bench/extrapolation.py [--steps 300] [--methods rope alibi]
"""

import argparse
import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batches.pretraining import Batch
from gptjax.config.data import DataConfig
from gptjax.config.model import ModelConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.run import Config
from gptjax.config.train import TrainConfig
from gptjax.model.gpt import hidden_states, logits
from gptjax.text.sources import read_documents
from gptjax.training.step import init_state, make_train_step

TRAINED, LENGTHS, SCORED, BATCH = 64, (64, 128, 512), 32, 16
SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 256, "norm": "rms", "bias": False}
METHODS = ("none", "sinusoidal", "rope", "alibi", "t5", "shaw")
ROPE_VARIANTS = {
    "rope, linear x L / 64": lambda length: {"rope_scaling": "linear", "rope_factor": length / TRAINED},
    "rope, ntk x L / 64": lambda length: {"rope_scaling": "ntk", "rope_factor": length / TRAINED},
    "rope, yarn x L / 64": lambda length: {
        "rope_scaling": "yarn", "rope_factor": length / TRAINED, "rope_original_length": TRAINED,
    },
    "rope, window of 64": lambda length: {"attention_window": TRAINED} if length > TRAINED else {},
    "rope, window of 60 and 4 first tokens": lambda length: {"attention_window": TRAINED - 4, "attention_sinks": 4},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    train_N, validation_N = corpus()
    print(f"| positions | {' | '.join(f'{length:,} bytes' for length in LENGTHS)} |\n|---{'|---' * len(LENGTHS)}|")
    for name in options.methods:
        model = ModelConfig(**SHAPE, positions=name, block_size=TRAINED)
        params = trained(model, train_N, options.steps)
        variants = {name: lambda length: {}} | (ROPE_VARIANTS if name == "rope" else {})
        for variant, change in variants.items():
            losses = []
            for length in LENGTHS:
                changed = dataclasses.replace(model, block_size=length, **change(length))
                losses.append(f"{last_loss(changed, params, validation_N, length):.3f}")
            print(f"| {variant} | {' | '.join(losses)} |", flush=True)


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the standard library, every tenth file apart."""
    texts = [document.text.encode() for document in read_documents(DataConfig(source="python-stdlib"), Counter())]
    parts = b"".join(t for n, t in enumerate(texts) if n % 10), b"".join(texts[::10])
    return tuple(np.frombuffer(part, np.uint8).astype(np.int32) for part in parts)


def trained(model: ModelConfig, tokens_N: np.ndarray, steps: int) -> dict:
    """Parameters after so many steps on random windows, the same ones for every model."""
    optim = OptimConfig(learning_rate=2e-3, min_learning_rate=2e-4, warmup_steps=30)
    train = TrainConfig(num_steps=steps, batch_size=BATCH, compute_dtype="float32")
    config = Config(model=model, optim=optim, train=train)
    step, random = jax.jit(make_train_step(config)), np.random.default_rng(0)
    state = jax.jit(init_state, static_argnums=0)(config)
    for _ in range(steps):
        rows_BT = windows(tokens_N, random.integers(0, len(tokens_N) - TRAINED - 1, BATCH), TRAINED + 1)
        state, _ = step(state, batch_of(rows_BT))
    return state.params


def last_loss(model: ModelConfig, params: dict, tokens_N: np.ndarray, length: int) -> float:
    """Mean loss in nats of the last positions of windows that end at the same places for every length."""
    ends = np.linspace(max(LENGTHS) + 1, len(tokens_N), 64).astype(int)
    rows_BT = windows(tokens_N, ends - length - 1, length + 1)
    parts = [last_losses(model, params, rows_BT[first : first + 8]) for first in range(0, len(rows_BT), 8)]
    return float(np.mean(parts))


@functools.partial(jax.jit, static_argnums=0)
def last_losses(model: ModelConfig, params: dict, rows_BT: jax.Array) -> jax.Array:
    """Losses of the last positions, `[B, SCORED]`."""
    positions_BT = jnp.broadcast_to(jnp.arange(rows_BT.shape[1] - 1), rows_BT[:, :-1].shape)
    x_BTD = hidden_states(model, params, rows_BT[:, :-1], positions_BT)[:, -SCORED:]
    log_BTV = jax.nn.log_softmax(logits(model, params, x_BTD))
    return -jnp.take_along_axis(log_BTV, rows_BT[:, -SCORED:, None], axis=-1)[..., 0]


def windows(tokens_N: np.ndarray, starts_B: np.ndarray, length: int) -> np.ndarray:
    """Rows of consecutive tokens."""
    return tokens_N[starts_B[:, None] + np.arange(length)[None]]


def batch_of(rows_BT: np.ndarray) -> Batch:
    """One micro-batch of whole windows."""
    positions_BT = np.broadcast_to(np.arange(TRAINED, dtype=np.int32), (BATCH, TRAINED))
    return Batch(*(x[None] for x in (rows_BT[:, :-1], rows_BT[:, 1:], np.zeros_like(positions_BT), positions_BT)))


if __name__ == "__main__":
    main()
