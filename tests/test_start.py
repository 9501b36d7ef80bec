"""Where a run's config comes from: a file, a run directory, or defaults for the machine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.cli import main
from gptjax.config.reader import load_config, read_flags, to_yaml
from gptjax.config.run import Config
from gptjax.config.start import load_run_config, start_config
from gptjax.errors import UserError
from gptjax.machine.accelerator import has_accelerator
from tests.tiny import write_corpus

TINY = ("--model.n_layer", "1", "--model.n_embd", "16", "--model.block_size", "16", "--tokenizer.kind", "bytes",
        "--train.eval_windows", "4", "--train.num_steps", "2", "--train.batch_size", "4")  # fmt: skip


def start(*flags: str, place: str = "", accelerator: bool = False):
    return start_config(place, read_flags(Config, flags), accelerator)


def write_run(folder: Path, *flags: str) -> Path:
    """A run directory as far as configs are concerned."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(start(*flags).config))
    return folder


def test_without_a_file_the_defaults_fit_the_machine_and_are_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small, large = (start("--data.path", "x", accelerator=accelerator) for accelerator in (False, True))
    assert small.config.model.n_embd < large.config.model.n_embd
    assert small.config.tokenizer.kind == "bpe" and small.config.run_dir == "runs/default"
    assert f"{small.config.model.n_layer} layers" in small.note and "a CPU" in small.note
    assert small.config != Config(data=small.config.data)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--tokenizer.kind", "bytes"), lambda c: c.tokenizer.kind == "bytes"),
        (("--optim.schedule", "constant"), lambda c: c.optim.schedule == "constant"),
        (("--optim.learning_rate", "1e-5"), lambda c: c.optim.min_learning_rate == pytest.approx(1e-6)),
        (("--train.num_steps", "30"), lambda c: c.optim.warmup_steps == 3),
        (("--task.kind", "classify"), lambda c: c.task.kind == "classify"),
        (("--task.kind", "instruct", "--init_from", "b"), lambda c: c.model == Config().model),
    ],
)
def test_no_default_stands_against_a_flag(tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    for accelerator in (False, True):
        assert expected(start(*flags, accelerator=accelerator).config)


@pytest.mark.parametrize("rate", ["nan", "inf", "1e400", "abc", "-1"])
def test_a_wrong_rate_is_refused_under_its_own_name(rate):
    flags = read_flags(Config, ["--optim.learning_rate", rate, "--data.path", "x"])
    with pytest.raises(UserError, match=r"optim\.learning_rate="):
        start_config("", flags, accelerator=False)


def test_a_run_directory_stands_for_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs/default", "--data.path", "x", "--model.n_layer", "3")
    resumed = [start(place="runs/default"), start("--data.path", "x"), start("--run_dir", "runs/default")]
    assert {(c.config.model.n_layer, c.config.run_dir) for c in resumed} == {(3, "runs/default")}
    assert start("--train.num_steps", "7", place=str(run)).config.train.num_steps == 7
    run.rename(tmp_path / "moved")
    assert start(place="moved").config.run_dir == "moved"
    with pytest.raises(UserError, match=r"runs: no run directory \(it has no config.yaml\)"):
        start(place="runs")


def test_a_run_of_an_older_version_may_have_options_without_effect(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", "--data.path", "x", "--task.kind", "classify", "--task.folds", "5")
    text = (run / "config.yaml").read_text()
    for new in ("patience: 3", "eval_every: 0", "validation_fraction: 0.2"):
        text = re.sub(rf"\b{new.partition(':')[0]}: .*", new, text)
    (run / "config.yaml").write_text(text)
    config = load_run_config(run)
    assert (config.train.patience, config.data.validation_fraction) == (0, Config().data.validation_fraction)
    assert config.train.eval_every == 0 and config.task.folds == 5 and start(place="run").config.train == config.train
    with pytest.raises(UserError, match=r"train.patience=4 has no effect"):
        start("--train.patience", "4", place="run")
    with pytest.raises(UserError, match=r"has no effect"):
        load_config(run / "config.yaml")
    (run / "config.yaml").write_text(text.replace("batch_size: ", "batch_size: -"))
    with pytest.raises(UserError, match=r"train.batch_size=-"):
        load_run_config(run)


def test_options_that_the_base_decides_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = write_run(tmp_path / "base", "--data.path", "x", "--tokenizer.kind", "bytes", "--model.n_layer", "3")
    (tmp_path / "c.yaml").write_text(f"init_from: {base}\ntokenizer: {{kind: bpe, vocab_size: 300}}\n")
    for place, flags, message in (
        ("c.yaml", (), "tokenizer.kind='bpe' has no effect with init_from="),
        ("", ("--tokenizer.kind", "chars"), "tokenizer.kind='bytes'; leave it out"),
        ("", ("--model.n_layer", "12"), "model.n_layer=12 has no effect"),  # the default of a run of its own
    ):
        with pytest.raises(UserError, match=message):
            start("--init_from", str(base), *flags, place=place)
    allowed = ("--model.n_layer", "3", "--model.dropout", "0.1", "--model.vocab_size", "0")
    assert start("--init_from", str(base), *allowed).config.model.dropout == 0.1


def test_training_needs_no_config_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = str(write_corpus(tmp_path / "corpus"))
    assert main(["train", "--data.path", corpus, "--cache_dir", str(tmp_path / "cache"), *TINY]) == 0
    assert "config      no file: defaults for a CPU" in capsys.readouterr().out
    written = load_config("runs/default/config.yaml")
    assert (written.train.num_steps, written.train.batch_size, written.optim.beta2) == (2, 4, 0.99)
    assert main(["train", "runs/default", "--train.num_steps", "3"]) == 0
    assert "step 2" in capsys.readouterr().out and load_config("runs/default/config.yaml").train.num_steps == 3
    assert main(["prepare", "runs/default"]) == 0
    assert "40 documents" in capsys.readouterr().out


def test_rows_need_no_preparation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--task.kind", "classify", "--data.path", "rows.jsonl"]) == 2
    assert "there is nothing to prepare" in capsys.readouterr().err


def test_an_accelerator_needs_its_device_and_its_plugin(tmp_path, monkeypatch):
    assert not has_accelerator({}, tmp_path)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "jax_cuda12_plugin" or None)
    assert has_accelerator({}, tmp_path) and not has_accelerator({"JAX_PLATFORMS": "cpu"}, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not has_accelerator({}, tmp_path)


def test_preparing_loads_no_jax(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    flags = ["--data.path", str(corpus), "--run_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    code = f"import sys; from gptjax.cli import main; main({['prepare', *flags]!r}); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[1])
