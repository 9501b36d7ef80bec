"""Extractive question answering: places of answers, windows, scores, and a whole run."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.labelled import Marks
from gptjax.batches.spans import SpanBatch, encode_questions
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.evaluation.answers import AnswerPredictions, normalised_answer, score_answers, word_f1
from gptjax.report.metrics import read_metrics
from gptjax.tasks.answer import best_spans, span_logits, span_loss
from gptjax.tasks.heads import NO_CANDIDATE
from gptjax.tasks.registry import parse
from gptjax.text.answers import Question
from gptjax.text.formats import Row
from gptjax.text.tokenizer import make_tokenizer
from gptjax.training import trainer
from tests.tiny import replace, run_config

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), lambda: [])
MARKS = Marks((300,), (301,), (302,))
TASK = TaskConfig(kind="answer")


@pytest.mark.parametrize("stride", [0, 3])
def test_windows_overlap_and_each_token_of_the_text_can_be_found(stride):
    text = "é234567890abcdefghij"  # 21 bytes
    example = Question(text, "q?", ("cde",), text.index("cde"), "r")
    rows = encode_questions([example], BYTES, MARKS, 13, stride)  # room for 8 bytes
    seen: set[int] = set()
    for ids, window, target in zip(rows.tokens, rows.windows, rows.targets, strict=True):
        assert ids[:4].tolist() == [300, *b"q?", 301] and ids[-1] == 302 and window.first == 4
        part = range(int(window.offsets[0]), int(window.offsets[-1]))
        assert bytes(ids[4:-1].tolist()) == text.encode()[part.start : part.stop]
        assert not seen or len(seen & set(part)) >= stride
        seen |= set(part)
        if target.any():
            first, last = window.offsets[target[0] - 4], window.offsets[target[1] - 4 + 1]
            assert text.encode()[first:last] == b"cde"
    assert seen == set(range(21)) and rows.cut.all()
    assert rows.targets.any(axis=1).sum() >= 1
    assert len(rows.tokens) == (3 if stride == 0 else 4)


def test_the_loss_is_the_mean_of_both_ends_over_tokens_of_the_text():
    random = np.random.default_rng(0)
    head = {"w": random.normal(size=(2, 4)).astype(np.float32), "bias": random.normal(size=2).astype(np.float32)}
    x = random.normal(size=(2, 7, 4)).astype(np.float32)
    batch = SpanBatch(
        jnp.zeros((2, 7), "int32"), jnp.array([7, 5]), jnp.array([3, 2]), jnp.array([[4, 5], [0, 0]]), jnp.ones(2)
    )
    expected = 0.0
    for row, allowed in enumerate(([0, 3, 4, 5], [0, 2, 3])):
        for side in range(2):
            logits = x[row].astype(np.float64) @ head["w"][side] + head["bias"][side]
            log_z = np.log(np.exp(logits[allowed]).sum())
            expected += (log_z - logits[int(batch.targets[row, side])]) / 2
    loss = span_loss(span_logits(head, jnp.asarray(x), batch), batch)
    assert float(loss.nll) == pytest.approx(expected, rel=1e-5) and float(loss.count) == 2


def test_the_best_span_ends_where_it_begins_or_later():
    logits = np.full((1, 2, 6), NO_CANDIDATE, np.float32)
    logits[0, 0, [0, 2, 4]], logits[0, 1, [0, 2, 4]] = [1.0, 3.0, 9.0], [2.0, 8.0, 1.5]  # 4 to 2 would be 17
    np.testing.assert_allclose(best_spans(jnp.asarray(logits)), [[2, 2, 11.0, 3.0]])


def test_scores_are_those_of_squads_script():
    assert normalised_answer("The  Quick, brown fox!") == "quick brown fox"
    assert word_f1("the cat sat", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert word_f1("", "") == 1.0 and word_f1("x", "") == 0.0
    found = AnswerPredictions(("An Apple.", "red car", ""), (0, 4, -1), (("apple", "pear"), ("car",), ()))
    scores = score_answers(found, 0.0)
    assert scores.exact_match == pytest.approx(2 / 3)
    assert scores.f1 == pytest.approx((1 + 2 * 1 / 3 + 1) / 3)


ROW = {"text": "a bc d", "question": "q"}
WRONG = [
    (TASK, ROW | {"answers": {"text": ["bc"], "answer_start": [3]}}, r"r:1: .*'bc' is not at character 3 .*'c '"),
    (TASK, ROW | {"answers": {"text": ["d"], "answer_start": [60]}}, r"r:1: .*60 .*'nothing'"),
    (TASK, ROW | {"answers": "xyz"}, "r:1: .*'xyz' is nowhere in field 'text'"),
    (TASK, ROW | {"answers": []}, r"r:1: field 'answers' has no answer; set task.no_answer=true"),
    (dataclasses.replace(TASK, question_field="ask"), ROW, r"r:1: .*'ask'.*task.question_field"),
    (dataclasses.replace(TASK, answers_field="gold"), ROW, r"r:1: .*'gold'.*task.answers_field"),
    (dataclasses.replace(TASK, no_answer=True), ROW | {"answers": [{"text": 3}]}, "r:1: .*as SQuAD's rows"),
]


@pytest.mark.parametrize("task, row, message", WRONG)
def test_a_wrong_row_is_named(task, row, message):
    with pytest.raises(UserError, match=message):
        list(parse([Row(row, "r:1")], task, DataConfig()))
    if task.no_answer:
        [example] = parse([Row(ROW | {"answers": {"text": [], "answer_start": []}}, "r:1")], task, DataConfig())
        assert example.answers == ()


def test_layouts_of_answers_and_a_question_without_room():
    layouts = [{"text": ["bc", "b"], "answer_start": [2, 2]}, [{"text": "bc", "answer_start": 2}, {"text": "b"}]]
    for layout in [*layouts, ["bc", "b"]]:
        [example] = parse([Row(ROW | {"answers": layout}, "r:1")], TASK, DataConfig())
        assert (example.answers, example.start) == (("bc", "b"), 2)
    with pytest.raises(UserError, match=r"r:1: the question has 1 tokens, which leaves 6 .* more than task.stride=6"):
        encode_questions([example], BYTES, MARKS, 10, 6)


def test_a_run_is_trained_measured_and_used(tmp_path, capsys):
    rows = [
        {"context": f"{'z ' * (n % 9)}k{n} v{n}", "question": f"k{n}?", "answers": f"v{n}" if n % 4 else []}
        for n in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig(kind="answer", no_answer=True, stride=4, max_tokens=24)
    data = {"path": (str(tmp_path / "rows.jsonl"),), "text_field": "context", "validation_fraction": 0.3}
    train = {"num_steps": 2, "eval_windows": 512, "eval_every": 2, "best_by": "f1"}
    config = replace(run_config(tmp_path), data=data, task=task, train=train)
    assert trainer.train(config) == 0
    last = read_metrics(Path(config.run_dir))[-1]
    assert np.isfinite(last["val_loss"]) and 0 <= last["exact_match"] <= last["f1"] <= 1
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", config.run_dir]) == 0
    assert f"exact match {last['exact_match']:.4f}" in capsys.readouterr().out
    given = [row | {"answer_start": "old"} for row in rows]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    assert main(["predict", "--run_dir", config.run_dir, "--file", str(tmp_path / "given.jsonl")]) == 0
    for row in map(json.loads, capsys.readouterr().out.splitlines()):
        place = row["answer_start"]
        assert row["input.answer_start"] == "old"
        assert (place < 0 and not row["predicted"]) or row["context"][place:].startswith(row["predicted"])
