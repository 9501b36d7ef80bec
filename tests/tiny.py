"""The small model, data and batches that tests share; whoever shares a config shares its compiled programs."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.pretraining import Batch
from gptjax.checkpoints.run_dir import write_run
from gptjax.config.data import DataConfig
from gptjax.config.model import ModelConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.run import Config
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.train import TrainConfig
from gptjax.model import gpt
from gptjax.model.gpt import Compute
from gptjax.ops.cross_entropy import Loss
from gptjax.report.metrics import read_metrics
from gptjax.tasks import trainable
from gptjax.text.tokenizer import make_tokenizer
from gptjax.training import step
from gptjax.training.resume import load_state

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
MODEL = ModelConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=16)
CONFIG = Config(
    model=MODEL,
    optim=OptimConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=2),
    train=TrainConfig(num_steps=20, batch_size=8, compute_dtype="float32", unroll=1, log_every=1, eval_every=0),
)


# Compiled as wholes, which takes a fraction of compiling operation by operation.
init_params = jax.jit(gpt.init_params, static_argnums=0)
init_state = jax.jit(step.init_state, static_argnums=0)
init_all = jax.jit(trainable.init_all, static_argnums=0)
hidden_states = jax.jit(
    functools.partial(gpt.hidden_states, compute=Compute(unroll=1)), static_argnums=0, static_argnames="compute"
)
extend = jax.jit(gpt.extend, static_argnums=(0, 4))


def replace(config: Config, **sections) -> Config:
    """`replace(CONFIG, train={"batch_size": 4})` changes fields inside sections; plain fields go directly."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(config, **changed)


def make_batch(micro_batches: int = 1, batch_size: int = 8, model: ModelConfig = MODEL, seed: int = 1) -> Batch:
    """Random tokens `[M, B, T]`, two documents a row, targets masked unevenly: mean-of-means would differ."""
    T = model.block_size
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, (batch_size, T + 1), dtype=np.int32)
    targets = tokens[:, 1:].copy()
    targets[0, 3:] = -1
    targets[1, ::2] = -1
    segments = np.broadcast_to((np.arange(T) >= T // 3).astype(np.int32), (batch_size, T))
    positions = np.broadcast_to(np.where(np.arange(T) < T // 3, np.arange(T), np.arange(T) - T // 3), (batch_size, T))
    arrays = (tokens[:, :-1], targets, segments, positions.astype(np.int32))
    return Batch(*(x.reshape(micro_batches, batch_size // micro_batches, T) for x in arrays))


@functools.cache
def train_step(config: Config):
    """The compiled step of a config; states are not donated, so that tests may look at them again."""
    return jax.jit(step.make_train_step(config))


def make_step_without_model(config: Config):
    """A step whose gradient is a function of parameters and step number, so that compiling it takes little time."""

    def gradient(state, _batch):
        def of_leaf(leaf):
            angles = 20.0 * leaf + jnp.arange(leaf.size).reshape(leaf.shape)
            return 0.01 * (1 + state.step) * jnp.sin(angles + state.step)  # of a norm below 1 first, then above

        return Loss(jnp.float32(3.0), jnp.float32(3.0), jnp.float32(1.0)), jax.tree.map(of_leaf, state.params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_gradient", lambda _config: gradient)
        return step.make_train_step(config)


def run_steps(config: Config, steps: int, batch: Batch):
    """Trains on one batch again and again; returns the state and the losses."""
    state, losses = init_state(config), []
    for _ in range(steps):
        state, metrics = train_step(config)(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """A corpus of small text files with something to learn in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = [f"{'abcdefgh'[(number + i) % 8] * 3} {i % 7}" for i in range(60)]
        (folder / f"{number:03}.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def run_config(tmp_path: Path, **sections) -> Config:
    """A whole run on a small corpus with a byte tokenizer."""
    config = Config(
        run_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path.parent / "cache"),
        model=dataclasses.replace(MODEL, vocab_size=0, block_size=32),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(path=(str(write_corpus(tmp_path / "corpus")),)),
        optim=CONFIG.optim,
        train=TrainConfig(
            **{"num_steps": 6, "batch_size": 8, "log_every": 1, "eval_every": 3, "eval_windows": 8},
            **{"unroll": 1, "save_every": 2, "keep_checkpoints": 10, "sample_tokens": 0, "compute_dtype": "float32"},
        ),
    )
    return replace(config, **sections)


def untrained_run(tmp_path: Path, **sections) -> Config:
    """A run directory of a model that was not trained, whose large weights make every token depend on its context."""
    config = run_config(tmp_path, **sections)
    files = sorted(Path(config.data.path[0]).iterdir())
    tokenizer = make_tokenizer(config.tokenizer, lambda: (file.read_text(encoding="utf-8") for file in files))
    config = replace(config, model={"vocab_size": tokenizer.vocab_size})
    params = jax.tree.map(lambda leaf: 8 * leaf, init_params(config.model, jax.random.key(0)))
    write_run(Path(config.run_dir), config, params, tokenizer)
    return config


# All that makes going on hard: dropout, accumulation, an average of the parameters.
HARD = {"model": {"dropout": 0.2}, "train": {"micro_batch_size": 4, "ema": 0.9, "sample_tokens": 4}}


def rows(config: Config) -> list[dict]:
    """What a run wrote of its metrics, without what depends on the clock."""
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_metrics(Path(config.run_dir))]


def final_state(config: Config):
    """The newest checkpoint of a run, on one device, and its plain values."""
    return load_state(Path(config.run_dir))


def layer_by_layer(config: ModelConfig, params: dict) -> dict:
    """Params as decoding takes them, with weights as they are trained."""
    blocks = {i: jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(config.n_layer)}
    return params | {"blocks": blocks}
