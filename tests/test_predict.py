"""What `gptjax predict` writes: valid JSON, nothing overwritten, cut texts said; and what it refuses."""

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gptjax.batches.labelled import encode_texts
from gptjax.batches.packed import encode_chats, encode_words
from gptjax.checkpoints.run_dir import write_run
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.embed import EmbedConfig
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.config.verbs.predict import PredictConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.text.chats import Message, render_chat
from gptjax.text.labelled import Text, Words
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.tiny import MODEL, init_all, replace

CONFIG = Config(model=MODEL, tokenizer=TokenizerConfig(kind="bytes"), data=DataConfig(path=("unused",)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of classify and one of tag that read 16 tokens; neither is trained."""
    folder = tmp_path_factory.mktemp("predict")
    for kind, labels in (("classify", ("ham", "spam")), ("tag", ("A", "B"))):
        config = replace(CONFIG, model={"vocab_size": 257}, task=TaskConfig(kind=kind, labels=labels))
        write_run(folder / kind, config, init_all(config, jax.random.key(0)), ByteTokenizer())
    return folder


def predict(capsys, run_dir: Path, *args: object) -> tuple[list[dict], str]:
    """The rows that are printed, and what is said."""
    capsys.readouterr()
    assert main(["predict", "--run_dir", str(run_dir), *map(str, args)]) == 0
    printed = capsys.readouterr()
    return [json.loads(line, parse_constant=pytest.fail) for line in printed.out.splitlines()], printed.err


def test_cut_texts_are_counted_and_marked(runs, capsys):
    rows, said = predict(capsys, runs / "classify", "--text", "x" * 14, "x" * 15, "é" * 8)
    assert [row["cut"] for row in rows] == [False, True, True]
    assert '2 of 3 rows were cut at 16 tokens; they have "cut": true' in said
    rows, said = predict(capsys, runs / "tag", "--text", "ab cd " * 9, "ab " + "x" * 15)
    assert [row["cut"] for row in rows] == [False, True] and "1 of 2 rows were cut" in said
    assert "cut" not in predict(capsys, runs / "classify", "--text", "short")[1]


def test_numbers_that_json_does_not_have_become_null_and_no_field_is_overwritten(runs, tmp_path, capsys):
    table = {
        "text": ["hi 1", "hi 2"],
        "score": [float("nan"), 1.0],
        "nested": [[float("inf"), 2.0], [3.0]],
        "predicted": ["old 1", "old 2"],
        "cut": [1, 2],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    out = tmp_path / "out.jsonl"
    args = ["predict", "--run_dir", str(runs / "classify"), "--file", str(tmp_path / "a.parquet"), "--out", str(out)]
    assert main(args) == 0
    said = capsys.readouterr().err
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in out.read_text().splitlines())
    assert first["score"] is None and first["nested"] == [None, 2.0] and second["score"] == 1.0
    assert (first["input.predicted"], first["input.cut"], first["cut"]) == ("old 1", 1, False)
    assert first["predicted"] in ("ham", "spam")
    assert '2 rows have a field named predicted or probabilities or cut; the output has it as "input.NAME"' in said
    assert main(["predict", "--run_dir", str(runs / "classify"), "--file", str(out)]) == 2
    assert "has both 'predicted' and 'input.predicted'" in capsys.readouterr().err


def test_the_file_of_predict_has_an_encoding_and_a_text_field_of_its_own(runs, tmp_path, capsys):
    (tmp_path / "a.csv").write_bytes("body,n\ncafé,1\nthé,2\n".encode("latin-1"))
    args = ("--file", tmp_path / "a.csv", "--data.text_field", "body")
    rows, _ = predict(capsys, runs / "classify", *args, "--data.encoding", "latin-1")
    assert [row["body"] for row in rows] == ["café", "thé"]
    rows, said = predict(capsys, runs / "classify", *args, "--data.invalid_utf8", "skip")
    assert rows == [] and "2 left out: not UTF-8" in said
    assert main(["predict", "--run_dir", str(runs / "classify"), "--text", "a", "--data.encoding", "latin-1"]) == 2
    assert "data.encoding='latin-1' has no effect without file" in capsys.readouterr().err
    assert main(["predict", "--run_dir", str(runs / "tag"), "--file", "x", "--data.text_field", "a"]) == 2
    assert "data.text_field has no effect on a run with task.kind=tag" in capsys.readouterr().err


def test_a_file_without_rows_is_refused_and_never_replaced_by_the_output(runs, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("")
    args = ["predict", "--run_dir", str(runs / "classify"), "--file", str(path), "--out"]
    assert main([*args, str(tmp_path / "out.jsonl")]) == 2
    assert f"{path}: has no rows" in capsys.readouterr().err and [*tmp_path.iterdir()] == [path]
    path.write_text('{"text": "a"}\n')
    assert main([*args, "."]) == 2 and ".: is a folder; name a file" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"figure='x.bmp' must end in .png, .svg or .pdf"):
        EvaluateConfig(run_dir="x", figure="x.bmp")
    for options in (EmbedConfig, PredictConfig):
        with pytest.raises(UserError, match="would replace the file of file; name another file"):
            options(run_dir="x", file=str(path), out=f"{tmp_path}/../{tmp_path.name}/a.jsonl")
    with pytest.raises(UserError, match="would replace the file of prompt_file"):
        SampleConfig(run_dir="x", prompt_file="a.jsonl", out="./a.jsonl")


def test_an_error_of_writing_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        write_atomic(tmp_path / "none" / "x.html", b"text")
    assert error.value.filename == str(tmp_path / "none" / "x.html")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: .*x\.html"):
        write_atomic(tmp_path / "x.html", b"text")
    assert not [*tmp_path.iterdir()]


def test_words_are_tagged_from_a_column_without_tags(runs, tmp_path, capsys):
    (tmp_path / "a.conll").write_text("John\nruns\n\n")
    rows, _ = predict(capsys, runs / "tag", "--file", tmp_path / "a.conll")
    assert rows[0]["tokens"] == ["John", "runs"] and len(rows[0]["predicted"]) == 2


# --- options that leave no room for a prediction ----------------------------------------------------------------


def test_max_tokens_leaves_room_for_a_token_of_a_text():
    examples = [Text("abc", ("x",), "")]
    assert [len(ids) for ids in encode_texts(examples, ByteTokenizer(), ("x",), False, 3).tokens] == [3]
    for max_tokens in (1, 2):
        with pytest.raises(UserError, match=f"task.max_tokens={max_tokens} must be at least 3: "):
            encode_texts(examples, ByteTokenizer(), ("x",), False, max_tokens)


@pytest.mark.parametrize("lookahead", [0, 1, 5])
def test_lookahead_leaves_room_for_a_token_of_a_word(lookahead):
    examples = [Words(("ab", "c"), ("x", "x"), "")]
    found = encode_words(examples, ByteTokenizer(), ("x",), lookahead + 2, lookahead)
    assert sum(len(positions) for positions in found.positions) == 2 and found.cut == (True,)
    assert all(len(sequence.inputs) == lookahead + 2 for sequence in found.sequences)
    with pytest.raises(UserError, match=f"task.lookahead={lookahead} must be at most task.max_tokens - 2 = "):
        encode_words(examples, ByteTokenizer(), ("x",), lookahead + 1, lookahead)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "classify", "max_tokens": 2}, "task.max_tokens=2 must be at least 3"),
        ({"kind": "tag", "max_tokens": 1}, "task.lookahead=0 must be at most task.max_tokens - 2 = -1"),
        ({"kind": "tag", "lookahead": 15}, "task.lookahead=15 must be at most task.max_tokens - 2 = 14"),
    ],
)
def test_a_run_without_room_for_a_prediction_is_refused(tmp_path, capsys, task, message):
    rows = [{"text": f"text {n}", "tokens": [f"a{n}"], "tags": ["xy"[n % 2]], "label": "xy"[n % 2]} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.yaml").write_text(
        "tokenizer: {kind: bytes}\nmodel: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}\n"
    )
    flags = [word for name, value in task.items() for word in (f"--task.{name}", str(value))]
    more = ["--data.path", str(tmp_path / "a.jsonl"), "--data.validation_fraction", "0.3"]
    assert main(["train", str(tmp_path / "a.yaml"), "--run_dir", str(tmp_path / "run"), *more, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_chat_that_fits_is_no_score():
    chat = render_chat([Message("user", "question"), Message("assistant", "answer")], "{role}{content}", "")
    found = encode_chats([chat], ByteTokenizer(), 5)
    assert found.sequences == [] and np.equal(found.target_bytes, 0)
