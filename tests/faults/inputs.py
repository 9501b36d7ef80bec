"""What the faults of data, config and sampling share: small inputs, and a command that must fail in one line."""

import dataclasses
import functools
from pathlib import Path

import jax

from gptjax.checkpoints.run_dir import write_run
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.model import ModelConfig
from gptjax.config.reader import to_yaml
from gptjax.config.run import Config
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.tiny import init_params, run_config

BYTES = TokenizerConfig(kind="bytes")
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257)


@functools.cache
def params() -> dict:
    """Weights spread so widely that logits differ clearly."""
    return jax.tree.map(lambda leaf: leaf * 4, init_params(MODEL, jax.random.key(0)))


def make_run(folder: Path) -> Path:
    """A run directory to sample from, without training."""
    write_run(folder, Config(model=MODEL, tokenizer=BYTES), params(), ByteTokenizer())
    return folder


def refused(capsys, *args: str) -> str:
    """Runs a command that must end with status 2 and one line on standard error; returns the line."""
    capsys.readouterr()
    status = main([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert status == 2, f"{args}: exit status {status}, must be 2: {error}"
    assert error.startswith("gptjax: ") and error.count("\n") == 1 and "Traceback" not in error, error
    return error.removeprefix("gptjax: ").strip()


def accepted(capsys, *args: str) -> str:
    """Runs a command that must end with status 0; returns its standard output."""
    capsys.readouterr()
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    assert status == 0, f"{args}: exit status {status}, must be 0: {captured.err}"
    return captured.out


def write_config(tmp_path: Path, *paths: Path | str, tokenizer: TokenizerConfig = BYTES, **data) -> Path:
    """A config file for a small run on `paths`, with a cache of its own."""
    config = run_config(tmp_path, train={"num_steps": 1, "eval_every": 0}, cache_dir=str(tmp_path / "cache"))
    data = dataclasses.replace(DataConfig(path=tuple(map(str, paths))), **data)
    config = dataclasses.replace(config, data=data, tokenizer=tokenizer)
    return save_config(tmp_path, config)


def save_config(tmp_path: Path, config: Config) -> Path:
    """Writes a config into the test's folder."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return path
