"""A prompt of each row of a file: templates, order, and resuming."""

import json
from pathlib import Path

import pytest

from gptjax.checkpoints.run_dir import write_run
from gptjax.cli import main
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.sample import sample_texts
from gptjax.text.formats import Row
from gptjax.text.tokenizers.plain import ByteTokenizer
from gptjax.verbs import sample_rows as module
from gptjax.verbs.sample_rows import fill, sample_rows
from tests.test_decode import make_params

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=257)
LETTERS = tuple(f"{i}=30" for i in b"abcdefgh")
ROWS = [{"name": "a" * (1 + 5 * n % 7), "n": n} for n in range(7)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "run"
    config = Config(run_dir=str(folder), model=MODEL, tokenizer=TokenizerConfig(kind="bytes"))
    write_run(folder, config, make_params(MODEL), ByteTokenizer())
    return folder


@pytest.fixture
def options(run_dir, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(**changed):
        given = {"max_new_tokens": 6, "num_samples": 2, "seed": 3, "logit_bias": LETTERS, "batch_size": 3}
        files = {"prompt_file": str(tmp_path / "in.jsonl"), "out": str(tmp_path / "out.jsonl")}
        return SampleConfig(run_dir=str(run_dir), prompt_template="{name}-{n}", **(files | given | changed))

    return make


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_rows_are_written_in_order_with_the_samples_of_their_prompts(options):
    config = options()
    assert sample_rows(config) == 7
    prompts = [f"{row['name']}-{row['n']}" for row in ROWS]
    expected = sample_texts(MODEL, make_params(MODEL), ByteTokenizer(), prompts, config)
    found = read(config.out)
    assert [{"name": row["name"], "n": row["n"]} for row in found] == ROWS
    assert [[sample["text"] for sample in row["samples"]] for row in found] == expected
    assert {sample["finish_reason"] for row in found for sample in row["samples"]} == {"length"}


def test_a_killed_command_resumes_and_writes_the_same(options, monkeypatch, tmp_path):
    config, told = options(), []
    sample_rows(config)
    whole = read(config.out)
    config = options(out=str(tmp_path / "again.jsonl"))
    calls, real = [], module.samples

    def dies(*args, **kwargs):
        calls.append(kwargs["numbers"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "samples", dies)
    with pytest.raises(KeyboardInterrupt):
        sample_rows(config)
    assert not (tmp_path / "again.jsonl").exists()
    lengths = [len(ROWS[n]["name"]) for numbers in calls[:2] for n in numbers]
    assert lengths == sorted(lengths, reverse=True)
    with open(tmp_path / "again.jsonl.partial", "a") as file:
        file.write('{"5": [{"text": "half a li')
    with pytest.raises(UserError, match="is of another run, of other options or of other prompts"):
        sample_rows(options(out=config.out, seed=4))
    monkeypatch.setattr(module, "samples", real)
    sample_rows(config, told.append)
    assert told == [f"{config.out}: 6 of 7 rows are done already"]
    assert read(config.out) == whole
    assert not (tmp_path / "again.jsonl.partial").exists()


def test_the_command_says_how_many_and_what_is_long(options, run_dir, tmp_path, capsys):
    config = options()
    command = ["sample", "--run_dir", str(run_dir), "--prompt_file", config.prompt_file, "--out", config.out]
    assert main([*command, "--prompt_template", "{name}" * 20, "--max_new_tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{config.out}: 7 rows\n"
    long = sum(20 * len(row["name"]) > 32 for row in ROWS)
    assert f"{long} prompts are longer than model.block_size=32" in err


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{a}", "x"), ("{{{a}}} {b}", "{x} 3"), ("{c}", '["é", null]'), ("{a.b}", "dots")],
)
def test_fields_stand_in_a_template(template, expected):
    assert fill(template, Row({"a": "x", "b": 3, "c": ["é", None], "a.b": "dots"}, "in.jsonl:1")) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{aa}", "in.jsonl:1: no field 'aa'"),
        ("{a", "is malformed"),
        ("plain", "names no field"),
        ("{a!r}", "must be a field's name alone"),
        ("{n}", "field 'n' is null"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template, message):
    with pytest.raises(UserError, match=message):
        fill(template, Row({"a": "x", "n": None}, "in.jsonl:1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "x"}, "out='x' has no effect without prompt_file"),
        ({"prompt_file": "x", "batch_size": 3}, "batch_size=3 has no effect without out"),
        ({"prompt_file": "x", "prompt_template": "{x}"}, "prompt_template='{x}' has no effect without out"),
    ],
)
def test_options_of_rows_need_rows(options, message):
    with pytest.raises(UserError, match=message):
        SampleConfig(**options)
