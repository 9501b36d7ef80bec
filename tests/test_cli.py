"""The command line as users meet it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.cli import VERBS, main
from gptjax.config.reader import read_flags, to_yaml
from gptjax.config.verbs.sample import SampleConfig
from gptjax.report.events import read_events
from gptjax.training import trainer
from gptjax.verbs.sample import read_prompts
from tests.tiny import run_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("cli"), train={"num_steps": 2, "eval_every": 2})
    assert trainer.train(config) == 0
    return config.run_dir


def fails(capsys, *args: str) -> str:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("gptjax: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_help_loads_nothing_heavy():
    code = "import sys; from gptjax.cli import main; main(['--help']); assert not {'jax', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert all(f"  {verb}" in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_options(capsys, verb):
    assert main([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: gptjax {verb}" in printed and "-dir STR" not in printed


def test_help_is_as_wide_as_the_terminal_and_does_not_wrap_at_80_columns_in_a_pipe(capsys, monkeypatch):
    def width() -> int:
        assert main(["evaluate", "--help"]) == 0
        _, options = capsys.readouterr().out.split(" options", 1)
        return max(map(len, options.splitlines()[1:]))

    monkeypatch.delenv("COLUMNS", raising=False)
    assert 120 < width() <= 129
    assert "COLUMNS" not in os.environ
    monkeypatch.setenv("COLUMNS", "70")
    assert width() <= 70


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "unknown verb 'trian'. Did you mean 'train'?"),
        (["train"], "usage: gptjax train [CONFIG.yaml | RUN_DIR]"),
        (["plot"], "Did you mean 'report'?"),
        (["finetune"], "Did you mean 'train'?"),
        (["train", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["train", str(ROOT / "configs/demo.yaml"), "--model.n_layers", "3"], "unknown option --model.n_layers"),
        (["sample", "--prompt", "x"], "--run_dir is missing"),
        (["sample", "--run_dir", "nowhere", "--prompt", "x"], "nowhere: no run directory"),
        (["sample", "--run_dir", "x", "--prompt", "y", "--temperature", "-1"], "temperature=-1.0 must not be negative"),
        (["evaluate"], "run_dir is missing"),
        (
            ["evaluate", "--run_dir", "x", "--data.max_documents", "3"],
            "data options have no effect on the run's own data",
        ),
        (["import", "nowhere"], "command line: to is missing"),
        (["import", "nowhere", "--to", "run"], "nowhere"),
        (["import", "~nobody-here/x", "--to", "run"], "is not a usable path"),
        (["export", "run", "--to", "~nobody-here/x"], "is not a usable path"),
        (["export", "nowhere", "--to", "hf"], "nowhere: no run directory"),
    ],
)
def test_mistakes_get_one_line_and_status_2(capsys, args, message):
    assert message in fails(capsys, *args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "no text: set one of data.path"),
        ({"path": ["nowhere.txt"]}, "nowhere.txt"),
        ({"path": ["empty"]}, "empty"),
        ({"path": ["short"]}, "fewer than one window of model.block_size=16"),
    ],
)
def test_a_corpus_that_cannot_be_trained_on_is_named(tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("short").mkdir()
    Path("short/a.txt").write_text("a few words")
    config = run_config(tmp_path, model={"block_size": 16}, data={"path": ()})
    Path("c.yaml").write_text(to_yaml(config))
    flags = ["--data.path", *change["path"]] if change else []
    assert message in fails(capsys, "train", "c.yaml", *flags)


def test_training_leaves_its_events_and_a_report(run_dir):
    events, _ = read_events(Path(run_dir))
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("save", 2), ("stop", 2)]
    assert events[2]["reason"] == "finished" and dict(events[0]["facts"])["steps"].startswith("2 = ")
    page = Path(run_dir, "report.html").read_text(encoding="utf-8")
    assert "2 of 2" in page and dict(events[0]["facts"])["parameters"] in page


def test_an_empty_prompt_is_refused(run_dir, capsys, monkeypatch):
    assert "prompt 1 is empty" in fails(capsys, "sample", "--run_dir", run_dir, "--prompt", "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "the prompt is empty" in fails(capsys, "sample", "--run_dir", run_dir)


def test_sampling_prints_the_same_text_for_the_same_seed(run_dir, capsys):
    def sample(*args):
        assert main(["sample", "--run_dir", run_dir, "--max_new_tokens", "12", *args]) == 0
        return capsys.readouterr().out

    several = sample("--prompt", "ab", "--prompt", "cde", "--num_samples", "2", "--seed", "1")
    assert several == sample("--prompt", "ab", "--prompt", "cde", "--num_samples", "2", "--seed", "1")
    assert several != sample("--prompt", "ab", "--prompt", "cde", "--num_samples", "2", "--seed", "2")
    assert several.count("---------------") == 4
    assert sample("--prompt", "ab", "--seed", "1").startswith("ab")


def test_the_prompt_may_come_from_a_file_or_standard_input(run_dir, tmp_path, capsys, monkeypatch):
    args = ["sample", "--run_dir", run_dir, "--max_new_tokens", "5"]
    outputs = []
    (tmp_path / "prompt.txt").write_text("aaa 1\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"aaa 1\n")))
    for more in (["--prompt", "aaa 1\n"], ["--prompt_file", str(tmp_path / "prompt.txt")], []):
        assert main([*args, *more]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]


def test_evaluate_repeats_what_training_measured(run_dir, capsys):
    assert main(["evaluate", "--run_dir", run_dir, "--windows", "8", "--batch_size", "8"]) == 0
    printed = capsys.readouterr().out.strip()
    trained = Path(run_dir, "metrics.jsonl").read_text()
    loss = printed.split()[1]
    assert f'"val_loss": {loss[:4]}' in trained


def test_prepare_says_what_it_made(tmp_path, capsys):
    config = run_config(tmp_path)
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert main(["prepare", str(path)]) == 0
    assert "40 documents" in capsys.readouterr().out


def test_train_py_and_sample_py_are_the_verbs(run_dir):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "sample.py"), "--run_dir", run_dir, "--prompt", "ab", "--max_new_tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("ab")
    wrong = subprocess.run([sys.executable, str(ROOT / "train.py")], capture_output=True, text=True, env=environment)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "gptjax: usage: gptjax train [CONFIG.yaml | RUN_DIR] [--section.key VALUE ...]\n",
    )


@pytest.mark.parametrize("prompts", [["--- a"], ["-- b", "- c"], ["--1"], ["---"]])
def test_a_value_may_begin_with_dashes(prompts):
    assert read_flags(SampleConfig, ["--prompt", *prompts, "--seed", "3"]) == {"prompt": prompts, "seed": 3}


def test_a_value_that_looks_like_an_option_is_given_with_an_equals_sign(capsys):
    assert read_flags(SampleConfig, ["--prompt=--seed"]) == {"prompt": ["--seed"]}
    error = fails(capsys, "sample", "--run_dir", "x", "--prompt", "--words")
    assert "--prompt needs a value; one that begins with -- is given as --prompt=--words" in error


def test_a_prompt_is_read_byte_for_byte_but_for_a_byte_order_mark(tmp_path, monkeypatch):
    content = b"\xef\xbb\xbfROMEO:\r\nHi\rthere \xef\xbb\xbf\n"
    (tmp_path / "prompt.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    for options in ({"prompt_file": str(tmp_path / "prompt.txt")}, {}):
        assert read_prompts(SampleConfig(run_dir="x", **options)) == ["ROMEO:\r\nHi\rthere \ufeff\n"]
