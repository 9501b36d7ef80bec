"""Inputs after public reports, from ../shared/cases: each is read right, or refused in one line.

The same kinds are held by small inputs in the other tests; this one runs the files themselves where they are.
"""

import json
from collections import Counter
from pathlib import Path

import jax
import pytest

from gptjax.checkpoints.run_dir import load_run, write_run
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.reader import load_config
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.exchange import ExportConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.exchange.runs import export_run, import_run
from gptjax.report.metrics import read_metrics
from gptjax.tasks.registry import parse
from gptjax.tasks.trainable import init_all
from gptjax.text.formats import read_file
from gptjax.text.rows import read_rows
from gptjax.text.tokenizers.plain import ByteTokenizer, CharTokenizer
from gptjax.training import trainer
from gptjax.verbs.sample import read_prompts
from tests.faults.inputs import refused
from tests.tiny import CONFIG, MODEL, init_params, replace

CASES = Path(__file__).parents[2] / "shared" / "cases"
YAML = """
tokenizer: {kind: bytes}
model: {n_layer: 1, n_head: 2, n_embd: 32, block_size: 64}
optim: {learning_rate: 3e-3, min_learning_rate: 1e-4}
train: {num_steps: 5, batch_size: 4, compute_dtype: float32, unroll: 1}
"""

pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not here")


def case(name: str) -> str:
    return str(CASES / name)


def rows(name: str, **options) -> list[dict]:
    return [row.values for row in read_rows([case(name)], "data.path", DataConfig(path=(case(name),), **options))]


def texts(name: str, **options) -> list[str]:
    data = DataConfig(path=(case(name),), **options)
    return [document.text for document in read_file(Path(case(name)), data, Counter())]


def config_file(tmp_path: Path, more: str = "") -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\ncache_dir: {tmp_path / 'cache'}\n{YAML}{more}")
    return path


def trains(tmp_path: Path, more: str) -> Path:
    config = load_config(config_file(tmp_path, more))
    assert trainer.train(config) == 0
    assert [row["step"] for row in read_metrics(Path(config.run_dir)) if "loss" in row]
    return Path(config.run_dir)


@pytest.mark.parametrize("first", ["chat", "zchat"])
def test_parts_whose_widths_differ(tmp_path, first):
    parts = (
        "task: {kind: multi}\nparts:\n"
        f"- {{name: {first}, task: {{kind: instruct}}, data: {{path: {case('chat_var.jsonl')}}}}}\n"
        f"- {{name: labels, task: {{kind: classify}}, data: {{path: {case('widths.jsonl')}}}}}\n"
    )
    trains(tmp_path, parts)


@pytest.mark.parametrize("name", ["quotes.tsv", "quotes2.tsv"])
def test_stray_quotes_in_tabs(name):
    assert len(rows(name)) == len(texts(name)) == 60
    assert {row["label"] for row in rows(name)} == {"ham", "spam"}


@pytest.mark.parametrize(("name", "key"), [("dup.csv", "column"), ("dup_cls.csv", "column"), ("dupkey.jsonl", "key")])
def test_two_of_one_name(tmp_path, capsys, name, key):
    for more in ("", "task: {kind: classify}\n"):
        line = refused(capsys, "train", config_file(tmp_path, f"data: {{path: {case(name)}}}\n{more}"))
        assert f"{name}:1: {key} 'text' is there twice" in line


def test_encodings_and_line_ends_of_rows(tmp_path, capsys):
    classify = TaskConfig(kind="classify")
    more = f"data: {{path: {case('latin1.csv')}}}\ntask: {{kind: classify}}\n"
    line = refused(capsys, "train", config_file(tmp_path, more))
    assert "latin1.csv:2: byte 0xe9 at offset 3 is not UTF-8" in line
    data = DataConfig(path=("x",), encoding="latin-1")
    found = list(parse(read_rows([case("latin1.csv")], "data.path", data), classify, data))
    assert found[0].text.startswith("café") and {label for e in found for label in e.labels} == {"a", "b"}
    for policy, mark in (("replace", "caf\ufffd"), ("skip", None)):
        left = rows("latin1.csv", invalid_utf8=policy)
        assert (left == []) if mark is None else left[0]["text"].startswith(mark)
    assert len(rows("cr_cls.csv")) == len(texts("cr_cls.csv")) > 20
    assert rows("view.parquet")[0] == {"text": "abc 0"} and texts("view.parquet")[0] == "abc 0"


def test_half_a_surrogate_pair_in_rows(tmp_path, capsys):
    more = f"data: {{path: {case('surrogate_classify.jsonl')}, validation_fraction: 0.3}}\ntask: {{kind: classify}}\n"
    assert "surrogate_classify.jsonl:8: U+D83D" in refused(capsys, "train", config_file(tmp_path, more))
    replaced, skipped = (rows("surrogate_classify.jsonl", invalid_utf8=policy) for policy in ("replace", "skip"))
    assert len(replaced) == 1 + len(skipped)


def test_a_character_that_the_tokenizer_lacks(tmp_path, capsys):
    config = Config(model=replace(CONFIG, model={"vocab_size": 5}).model, tokenizer=TokenizerConfig(kind="chars"))
    write_run(tmp_path / "base", config, init_params(config.model, jax.random.key(0)), CharTokenizer(" 1hi", True))
    more = f"init_from: {tmp_path / 'base'}\ndata: {{path: {case('unk.jsonl')}}}\n"
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\ncache_dir: {tmp_path / 'cache'}\n{more}")
    assert "unk.jsonl:2: character 'é' (U+00E9)" in refused(capsys, "train", path)


def test_conll_2003_and_conllu():
    assert rows("docstart.conll")[0]["tokens"] == ["John", "lives", "in", "Paris0"]
    assert not any("-DOCSTART-" in row["tokens"] for row in rows("docstart.conll"))
    for name in ("ud.conll", "ud2.conll"):
        assert rows(name)[0]["tokens"][:2] == ["Dogs", "bark"] and rows(name)[0]["tags"][:2] == ["NOUN", "VERB"]
    assert texts("ud.conll")[0].startswith("Dogs bark 0\nDogs bark 1\n")


@pytest.mark.parametrize("name", ["chat_null.jsonl", "chat_tool.jsonl", "chat_sharegpt.jsonl"])
def test_layouts_of_chats(name):
    counts = Counter()
    found = list(parse(read_rows([case(name)], "data.path"), TaskConfig(kind="instruct"), DataConfig(), counts=counts))
    assert len(found) == len(rows(name)) and all(chat.targets for chat in found)
    assert counts["turns_without_text"] == (len(found) if name == "chat_tool.jsonl" else 0)


def test_a_corpus_of_characters_without_a_newline(tmp_path):
    more = f"data: {{path: {case('no_newline.txt')}}}\n"
    config = load_config(config_file(tmp_path, more), {"tokenizer": {"kind": "chars"}})
    assert trainer.train(config) == 0
    assert load_config(Path(config.run_dir) / "config.yaml").train.sample_prompt == " "


def test_prompt_files_are_read_as_they_are():
    for name, text in (("prompt_crlf.txt", "ROMEO:\r\nHi"), ("prompt_bom.txt", "ROMEO:")):
        assert read_prompts(SampleConfig(run_dir="x", prompt_file=case(name))) == [text]


def test_predictions_beside_nan_and_a_field_of_that_name(tmp_path, capsys):
    config = Config(model=MODEL, tokenizer=TokenizerConfig(kind="bytes"), data=DataConfig(path=("unused",)))
    config = replace(config, model={"vocab_size": 257}, task=TaskConfig(kind="classify", labels=("a", "b")))
    write_run(tmp_path / "run", config, init_all(config, jax.random.key(0)), ByteTokenizer())
    out = tmp_path / "out.jsonl"
    args = ["--run_dir", str(tmp_path / "run"), "--file", case("pred_nan.parquet"), "--out", str(out)]
    assert main(["predict", *args]) == 0
    first = json.loads(out.read_text().splitlines()[0], parse_constant=pytest.fail)
    assert first["score"] is None and first["input.predicted"] == "old1" and first["predicted"] in ("a", "b")


def test_an_end_token_of_another_name(tmp_path):
    lines = []
    import_run(Path(case("hf_eos")), tmp_path / "run", notify=lines.append)
    run = load_run(tmp_path / "run")
    assert run.tokenizer is not None and run.tokenizer.end_of_text == 2 and run.tokenizer.decode([2]) == "</s>"
    export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "hf")))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 2
    assert not any("end token" in line for line in lines)
