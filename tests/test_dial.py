"""One dial: shape, batch, rate and steps follow from the depth by the rules that the docs name."""

import math

import pytest

from gptjax.cli import main
from gptjax.config.dial import SIZES, DialConfig, dial
from gptjax.config.reader import read_flags
from gptjax.config.run import Config
from gptjax.config.start import start_config
from gptjax.errors import UserError


def dialed(*flags: str, corpus_bytes: int = 0, **options) -> Config:
    return start_config("", read_flags(Config, flags), False, DialConfig(**options), corpus_bytes).config


def test_the_rules_are_those_that_are_named():
    config = dialed(depth=12)
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head, config.model.head_width) == (
        12,
        768,
        12,
        64,
    )
    parameters = 12 * 12 * 768**2  # GPT-2 124M without its embeddings
    tokens = config.train.num_steps * config.train.batch_size * config.model.block_size
    assert tokens == pytest.approx(20 * parameters, rel=1e-3)
    assert config.optim.learning_rate == pytest.approx(0.003239 - 0.0001395 * math.log(parameters), rel=0.02)
    assert config.optim.min_learning_rate == pytest.approx(config.optim.learning_rate / 10)
    best_batch = 0.2920 * (6 * parameters * 20 * parameters) ** 0.3271
    assert 0.7 < config.train.batch_size * config.model.block_size / best_batch < 1.5, "a power of two near it"
    assert config.train.micro_batch_size * config.model.block_size == 2**14


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 12, 24, 48])
def test_every_depth_is_a_config(depth):
    for corpus in (0, 1, 10**6, 10**12):
        config = dialed(depth=depth, corpus_bytes=corpus)
        assert config.model.n_layer == depth and 0 < config.optim.learning_rate < 4e-3


def test_little_text_is_repeated_at_most_sixteen_times():
    little, much = dial(4, 10**6).values["train"], dial(4, 10**12).values["train"]
    assert little["num_steps"] * little["batch_size"] * 256 == pytest.approx(16 * 10**6 / 4, rel=0.01)
    assert much == dial(4, 0).values["train"] and much["batch_size"] > little["batch_size"]


def test_names_of_sizes_and_flags_take_precedence():
    for name, depth in SIZES.items():
        assert dialed(size=name) == dialed(depth=depth)
    config = dialed("--train.batch_size", "6", "--tokenizer.kind", "bytes", "--optim.learning_rate", "1e-2", depth=8)
    assert (config.train.batch_size, config.train.micro_batch_size, config.tokenizer.kind) == (6, 0, "bytes")
    assert config.optim.min_learning_rate == pytest.approx(1e-3)


def test_where_the_dial_has_no_effect_it_is_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    assert main(["train", str(tmp_path / "a.yaml"), "--size", "small"]) == 2
    assert "size and depth have no effect" in capsys.readouterr().err
    with pytest.raises(UserError, match="init_from"):
        dialed("--init_from", "x", depth=2)
    for wrong in ({"size": "small", "depth": 3}, {"depth": -1}, {"depth": 49}):
        with pytest.raises(UserError):
            DialConfig(**wrong)


def test_prepare_measures_the_text_and_prints_the_choice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some words and more words\n" * 4000)
    args = ["--data.path", "a.txt", "--tokenizer.kind", "bytes", "--cache_dir", str(tmp_path / "cache")]
    assert main(["prepare", "--size", "small", *args]) == 0
    printed = capsys.readouterr().out
    assert "4 layers, 256 wide" in printed and "16 passes over about 0.1 MB" in printed
