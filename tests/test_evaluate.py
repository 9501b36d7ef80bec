"""Measuring a run on other text: all of it, by the run's own tokenizer, and what is said of it."""

import json
import math
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.pretraining import evaluation_batches
from gptjax.checkpoints.run_dir import load_run
from gptjax.cli import main
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.evaluation.sliding import sliding_spans
from gptjax.model.gpt import logits
from gptjax.text.shards import TokenSplit
from gptjax.text.tokenizer import save_tokenizer
from gptjax.text.tokenizers.plain import CharTokenizer
from gptjax.training import trainer
from tests.faults.inputs import refused
from tests.tiny import SHARED_DATA, hidden_states, run_config, untrained_run

CASES = SHARED_DATA.parent / "cases"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run on 40 small documents."""
    config = run_config(tmp_path_factory.mktemp("evaluate"), train={"num_steps": 2, "eval_every": 1})
    assert trainer.train(config) == 0
    return config


def evaluate(capsys, config, *args: object) -> list[str]:
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", config.run_dir, *map(str, args)]) == 0
    return capsys.readouterr().out.splitlines()


def numbers(line: str) -> list[float]:
    """Loss, perplexity and bits per byte of a line."""
    found = re.search(r"loss ([\d.]+) · perplexity ([\d.]+) · ([\d.]+) bits per byte", line)
    assert found, line
    return [float(number) for number in found.groups()]


def losses(config, ids: np.ndarray) -> np.ndarray:
    """The loss of each target of a stream that is a single document, cut into windows, by NumPy from the logits."""
    run, T = load_run(Path(config.run_dir)), config.model.block_size
    found = []
    for start in range(0, len(ids) - 1, T):
        window = ids[start : start + T + 1]
        tokens = jnp.asarray(window[None, :-1])
        positions = jnp.arange(tokens.shape[1])[None]
        x_BTD = hidden_states(run.config.model, run.params, tokens, positions)
        scores = np.asarray(logits(run.config.model, run.params, x_BTD), np.float64)[0]
        log_z = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
        found.append(log_z - scores[np.arange(len(scores)), window[1:]])
    return np.concatenate(found)


def test_all_of_a_text_is_measured(run, tmp_path, capsys):
    path, text = tmp_path / "other.txt", "aaa 1\nbbb 2\n" * 12 + "zzzz qqqq é"
    path.write_text(text, encoding="utf-8")
    raw = text.encode()
    expected = losses(run, np.array([256, *raw, 256]))
    first, about, checkpoint, overlap = evaluate(capsys, run, "--data.path", path)
    loss, perplexity, bits = numbers(first)
    assert loss == pytest.approx(expected.mean(), abs=1e-4)  # printed with four digits
    assert perplexity == pytest.approx(math.exp(expected.mean()), abs=0.02)
    assert bits == pytest.approx(expected.sum() / math.log(2) / len(raw), abs=1e-4)
    assert about == f"text        {path}: 1 document, {len(raw) + 2} tokens, {len(raw)} bytes"
    assert re.fullmatch(r"checkpoint  best, step [12] \(validation loss [\d.]+ in training\)", checkpoint)
    assert overlap == "own text    differs: none of 1 distinct documents is in the text of the run"


def test_the_checkpoint_is_the_one_that_was_asked_for(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("aaa")
    lines = evaluate(capsys, run, "--data.path", tmp_path / "a.txt", "--checkpoint", "latest")
    assert lines[2].startswith("checkpoint  latest, step 2 ")


def test_several_texts_have_a_line_each_and_a_total(run, tmp_path, capsys):
    texts = {"a.txt": "aaa 1\n" * 9, "b.txt": "x" * 300}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = [tmp_path / name for name in texts]
    *each, total = (numbers(line) for line in evaluate(capsys, run, "--data.path", *paths)[:3])
    for path, found in zip(paths, each, strict=True):
        assert found == numbers(evaluate(capsys, run, "--data.path", path)[0])
    targets, sizes = [len(text) + 1 for text in texts.values()], [len(text) for text in texts.values()]
    assert total[0] == pytest.approx(np.average([one[0] for one in each], weights=targets), abs=2e-4)
    assert total[2] == pytest.approx(np.average([one[2] for one in each], weights=sizes), abs=2e-3)


def test_the_text_of_the_run_is_recognized(run, tmp_path, capsys):
    [corpus] = run.data.path
    assert (
        "own text    8 of 8 distinct documents are in the text of the run"
        in evaluate(capsys, run, "--data.path", corpus)[-1]
    )
    shutil.copy(Path(corpus) / "003.txt", tmp_path / "copy.txt")
    (tmp_path / "new.txt").write_text("new")
    assert evaluate(capsys, run, "--data.path", tmp_path)[-1].startswith("own text    1 of 2 distinct documents are in")
    shutil.copytree(run.run_dir, tmp_path / "moved")
    config = (tmp_path / "moved/config.yaml").read_text()
    (tmp_path / "moved/config.yaml").write_text(config.replace(corpus, str(tmp_path / "gone")))
    moved = run_config(tmp_path, run_dir=str(tmp_path / "moved"))
    assert "own text    not compared" in evaluate(capsys, moved, "--data.path", tmp_path / "new.txt")[-1]


@pytest.mark.parametrize("kind", ["bpe", "chars"])
def test_the_tokenizer_is_the_one_of_the_run(tmp_path, capsys, kind):
    tokenizer = {"kind": kind} | ({"vocab_size": 300} if kind == "bpe" else {})
    config = run_config(tmp_path, tokenizer=tokenizer, train={"num_steps": 1, "eval_every": 0})
    assert trainer.train(config) == 0
    known = load_run(Path(config.run_dir)).tokenizer
    assert known is not None
    text = "aaa 1\nhhh 6\n" * 5
    (tmp_path / "other.txt").write_text(text)
    about = evaluate(capsys, config, "--data.path", tmp_path / "other.txt")[1]
    ends = 2 if known.end_of_text is not None else 0
    assert f"{len(known.encode(text)) + ends} tokens" in about
    (tmp_path / "strange.txt").write_text("zzz")
    status = main(["evaluate", "--run_dir", config.run_dir, "--data.path", str(tmp_path / "strange.txt")])
    assert (status, "strange.txt" in capsys.readouterr().err) == ((0, False) if kind == "bpe" else (2, True))


def test_the_text_is_cleaned_as_the_run_cleaned_its_own(tmp_path, capsys):
    config = run_config(tmp_path, data={"newlines": "unix"}, train={"num_steps": 1, "eval_every": 0})
    assert trainer.train(config) == 0
    (tmp_path / "a.txt").write_bytes(b"aaa\r\nbbb\r\n")
    assert " 8 bytes" in evaluate(capsys, config, "--data.path", tmp_path / "a.txt")[1]


def test_windows_limit_what_is_measured_and_are_mentioned(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("aaa 1\n" * 99 + "q" * 600)
    whole = evaluate(capsys, run, "--data.path", tmp_path / "a.txt")
    part = evaluate(capsys, run, "--data.path", tmp_path / "a.txt", "--windows", "3")
    assert numbers(whole[0]) != numbers(part[0])
    assert "windows     at most 3 of each text, evenly spaced" in part and len(part) == len(whole) + 1


def test_options_of_a_split_are_refused(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("aaa")
    args = ["--run_dir", run.run_dir, "--data.path", str(tmp_path / "a.txt"), "--data.validation_fraction", "0.5"]
    assert main(["evaluate", *args]) == 2
    assert "data.validation_fraction=0.5 has no effect" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    assert main(["evaluate", "--run_dir", run.run_dir, "--data.path", str(tmp_path / "empty.txt")]) == 2
    assert "no text to measure: 1 documents were read" in capsys.readouterr().err


def test_a_change_of_the_runs_own_text_is_told(tmp_path, capsys):
    config = run_config(tmp_path, train={"num_steps": 1, "eval_every": 0})
    assert trainer.train(config) == 0
    assert main(["evaluate", "--run_dir", config.run_dir]) == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "corpus" / "000.txt").write_text("another text\n" * 50)
    assert main(["evaluate", "--run_dir", config.run_dir]) == 0
    assert "its text has changed since it was trained" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_of_several_files_are_scored_alone_and_together(tmp_path, capsys):
    def write(name: str, numbers) -> Path:
        rows = ({"text": f"{'ab'[n % 2] * 3} {n}", "label": "ab"[n % 2]} for n in numbers)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    run_args = ["--data.path", str(write("train.jsonl", range(60))), "--task.kind", "classify"]
    sizes = ["--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "2", "--model.block_size", "16"]
    config = run_config(tmp_path)
    where = ["--run_dir", config.run_dir, "--cache_dir", config.cache_dir, "--tokenizer.kind", "bytes"]
    assert main(["train", *run_args, *sizes, *where, "--train.num_steps", "3"]) == 0
    first, second = write("a.jsonl", range(100, 110)), write("b.jsonl", range(200, 225))
    lines = evaluate(capsys, config, "--data.path", first, second)
    each = [re.search(r"accuracy ([\d.]+)", line) for line in lines[:3]]
    accuracy = [float(found.group(1)) for found in each if found]
    assert accuracy[2] == pytest.approx(np.average(accuracy[:2], weights=[10, 25]), abs=1e-3)
    assert f"rows        {first}, {second}: 35" in lines and lines[-1].startswith("checkpoint  best, step")
    assert evaluate(capsys, config)[0].startswith("loss ")


@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")
def test_every_document_of_a_file_is_measured(run, capsys):
    lines = evaluate(capsys, run, "--data.path", CASES / "evaldocs.jsonl", CASES / "eval_last.txt")
    assert "200 documents" in lines[0] and "1 document," in lines[1] and lines[2].startswith("total ")


def test_a_text_without_a_target_has_no_loss(tmp_path, capsys):
    run = untrained_run(tmp_path, tokenizer=TokenizerConfig(kind="chars"))
    path = Path(run.run_dir) / "tokenizer.json"
    letters = CharTokenizer("abc", False)  # without an end token, which would be a target after each document
    save_tokenizer(letters, path)
    (tmp_path / "letters.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    args = ["--run_dir", run.run_dir, "--data.path", tmp_path / "letters.jsonl"]
    assert "each document has a single token" in refused(capsys, "evaluate", *args)


def sliding_losses(config, ids: np.ndarray, stride: int) -> np.ndarray:
    """The loss of each target of one document, by NumPy: each from the window that scores it first."""
    run, T = load_run(Path(config.run_dir)), config.model.block_size
    found = np.full(len(ids) - 1, np.nan)
    for start in range(0, len(ids) - 1, stride):
        window = ids[start : start + T + 1]
        tokens = jnp.asarray(window[None, :-1])
        x_BTD = hidden_states(run.config.model, run.params, tokens, jnp.arange(tokens.shape[1])[None])
        scores = np.asarray(logits(run.config.model, run.params, x_BTD), np.float64)[0]
        nll = np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(scores)), window[1:]]
        new = np.isnan(found[start : start + len(nll)])
        found[start : start + len(nll)][new] = nll[new]
        if start + T >= len(ids) - 1:
            break
    assert not np.isnan(found).any()
    return found


def test_sliding_windows_score_each_token_once_with_the_context_that_is_stated(tmp_path, capsys):
    run = untrained_run(tmp_path)
    texts = ["aaa 1\nbbb 2\n" * 9 + "q", "zz"]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines = evaluate(capsys, run, "--data.path", tmp_path / "two.jsonl", "--stride", "5")
    expected = [sliding_losses(run, np.array([256, *text.encode(), 256]), 5) for text in texts]
    assert numbers(lines[0])[0] == pytest.approx(np.concatenate(expected).mean(), abs=1e-4)
    assert "windows     32 tokens, stride 5: each token is scored once, after at least 27 tokens" in "\n".join(lines)
    side_by_side = numbers(evaluate(capsys, run, "--data.path", tmp_path / "two.jsonl")[0])[0]
    assert numbers(lines[0])[0] != side_by_side
    assert "stride 32" in evaluate(capsys, run, "--stride", "32")[1]
    assert main(["evaluate", "--run_dir", run.run_dir, "--stride", "33"]) == 2
    assert "stride=33 must be at most model.block_size=32" in capsys.readouterr().err


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize(("end", "across"), [(9, False), (9, True), (None, False)])
def test_sliding_windows_have_the_targets_of_other_windows(stride, end, across):
    """Every position of the stream is a target as often as in windows side by side: once, or never."""
    lengths, separator = (1, 2, 8, 9, 17, 30), [] if end is None else [end]
    parts = [[*separator, *range(100 + 100 * i, 100 + 100 * i + n)] for i, n in enumerate(lengths)]
    starts = np.cumsum([0, *map(len, parts[:-1])]).astype(np.uint64)
    stream = np.array([token for part in parts for token in part] + separator, np.int32)
    split = TokenSplit((stream,), (starts,), 1, end)
    spans = list(sliding_spans(split, 8, stride, across))
    assert all(0 < span.scored < len(span.tokens) <= 9 for span in spans)
    scored = np.concatenate([span.tokens[-span.scored :] for span in spans])
    batches = evaluation_batches(split, 8, 0, 4, across)
    targets = np.concatenate([batch.targets[batch.targets >= 0] for batch in batches])
    np.testing.assert_array_equal(np.sort(scored), np.sort(targets))
    for span in spans:
        if end is not None and not across:
            assert (span.tokens[:1] == end).all() or len(span.tokens) - span.scored >= 8 - stride + 1


def test_rounded_weights_and_another_precision_are_measured(tmp_path, capsys):
    config = untrained_run(tmp_path)
    path = tmp_path / "other.txt"
    path.write_text("aaa 1\nbbb 2\n" * 3, encoding="utf-8")
    loss = {
        precision: numbers(evaluate(capsys, config, "--data.path", path, *precision.split())[0])[0]
        for precision in ("", "--compute_dtype bfloat16", "--quantize int8", "--quantize int4")
    }
    exact = loss.pop("")
    errors = {precision: abs(rounded - exact) for precision, rounded in loss.items()}
    assert 0 < errors["--quantize int8"] < errors["--quantize int4"] / 3
    assert errors["--compute_dtype bfloat16"] > 0
