"""Multiple choice by likelihood, generated answers, and the formats of public benchmarks."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoints.run_dir import load_run
from gptjax.cli import main
from gptjax.config.model import ModelConfig
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.errors import UserError
from gptjax.evaluation.benchmarks import READERS, Item, read_items
from gptjax.evaluation.few_shot import choose_shots, prompts
from gptjax.evaluation.generated import extract_answer
from gptjax.evaluation.likelihood import (
    Span,
    SpanScore,
    encode_pair,
    make_scorer,
    padded_length,
    pair_span,
    score_spans,
)
from gptjax.evaluation.multiple_choice import choice_results
from gptjax.evaluation.statistics import mean
from gptjax.evaluation.text_scores import text_scores
from gptjax.model.gpt import Compute, logits
from gptjax.text.formats import Row
from gptjax.text.rows import read_rows
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.tiny import MODEL, hidden_states, init_params, untrained_run

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of bytes."""
    return untrained_run(tmp_path_factory.mktemp("benchmarks"))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(capsys, config, *args: object) -> list[str]:
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", config.run_dir, *map(str, args)]) == 0
    return capsys.readouterr().out.splitlines()


def fails(capsys, config, *args: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", config.run_dir, *map(str, args)]) == 2
    return capsys.readouterr().err


def log_probabilities(model: ModelConfig, params: dict, ids) -> np.ndarray:
    """Of all next tokens at each position of one sequence, float64 `[T, V]`, without padding or batch."""
    tokens = jnp.asarray(ids)[None]
    scores = logits(model, params, hidden_states(model, params, tokens, jnp.arange(len(ids))[None]))[0]
    scores = np.asarray(scores, np.float64)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def item(row: dict, benchmark: str):
    [found] = read_items(benchmark, [Row(row, "f:1")], Counter())
    return found


def test_spans_are_scored_as_alone_whatever_their_batch_and_padding():
    params, rng = init_params(MODEL, jax.random.key(0)), np.random.default_rng(0)
    spans = [Span(rng.integers(0, 64, n), s) for n, s in ((2, 1), (17, 16), (9, 3), (17, 1), (5, 4), (12, 11))]
    greedy = [5, 7]
    greedy.append(int(log_probabilities(MODEL, params, greedy)[-1].argmax()))
    spans.append(Span(np.array(greedy), 1))
    found = score_spans(make_scorer(MODEL, Compute()), params, spans, MODEL.block_size, 3, DEVICE)
    for span, score in zip(spans, found, strict=True):
        expected = log_probabilities(MODEL, params, span.tokens[:-1])[-span.scored :]
        targets = span.tokens[-span.scored :]
        chosen = expected[np.arange(span.scored), targets].sum()
        assert score.log_probability == pytest.approx(chosen, abs=1e-4)
        assert score.greedy == bool((expected.argmax(-1) == targets).all())
    assert found[-1].greedy and not found[1].greedy


def test_few_lengths_are_compiled():
    assert {padded_length(n, 100) for n in range(1, 101)} == {16, 32, 64, 100}
    assert all(padded_length(n, 100) >= n for n in range(1, 101))


def test_a_pair_is_encoded_as_one_text_and_cut_at_its_start():
    tokenizer = ByteTokenizer()
    before, after = encode_pair(tokenizer, "ab ", "c")
    assert (bytes(before.tolist()), bytes(after.tolist())) == (b"ab", b" c")
    before, after = encode_pair(tokenizer, "", "c")
    assert before.tolist() == [256]
    span = pair_span(np.arange(10), np.array([20, 21]), 4)
    assert (span.tokens.tolist(), span.scored) == ([7, 8, 9, 20, 21], 2)
    assert pair_span(np.arange(1), np.arange(4), 4).scored == 4
    with pytest.raises(UserError, match="longer than the model reads"):
        pair_span(np.arange(3), np.arange(5), 4)
    with pytest.raises(UserError, match="empty continuation"):
        encode_pair(tokenizer, "a", "")


ROWS = [
    {
        "context": f"{'abcdefgh'[i % 8] * 3} {i % 7}\n",
        "choices": ["bbb 1 ddd", "c" * (1 + i % 4), "é f"],
        "answer": i % 3,
    }
    for i in range(11)
]


def test_the_choice_is_the_most_likely_raw_and_per_byte(run, tmp_path, capsys):
    lines = evaluate(capsys, run, "--benchmark", "choices", "--data.path", write(tmp_path / "c.jsonl", ROWS))
    loaded, raw, per_byte = load_run(Path(run.run_dir)), [], []
    for row in ROWS:
        found = []
        for choice in row["choices"]:
            ids, n = list((row["context"] + choice).encode()), 1 + len(choice.encode())  # the newline is scored too
            table = log_probabilities(loaded.config.model, loaded.params, ids[:-1])[-n:]
            found.append(table[np.arange(n), ids[-n:]].sum())
        sizes = [len(choice.encode()) for choice in row["choices"]]
        raw.append(np.argmax(found) == row["answer"])
        per_byte.append(np.argmax(np.divide(found, sizes)) == row["answer"])

    def text(right) -> str:
        p = np.mean(right)
        return f"{p:.4f} ± {np.sqrt(p * (1 - p) / (len(right) - 1)):.4f}"

    assert lines[0] == f"accuracy {text(raw)} · per byte {text(per_byte)} · 11 items"
    assert 0 < sum(raw) < 11 and raw != per_byte
    assert lines[1:3] == ["benchmark   choices, no examples in the prompt", f"rows        {tmp_path / 'c.jsonl'}: 11"]
    assert lines[3].startswith("checkpoint  best, step 0")


def test_a_choice_is_as_long_as_its_bytes_without_the_space_before_it():
    item = Item(("Q:",) * 2, (" a", " bbbb"), 1, "r:1")
    found = choice_results([item], [SpanScore(-1.5, False), SpanScore(-4.0, False)])  # -1.5 and -1 for each byte
    assert (found.right.tolist(), found.right_per_byte.tolist()) == ([0.0], [1.0])


def test_files_have_a_line_each_and_a_total(run, tmp_path, capsys):
    paths = [write(tmp_path / "a.jsonl", ROWS[:4]), write(tmp_path / "b.jsonl", ROWS[4:])]
    both = evaluate(capsys, run, "--benchmark", "choices", "--data.path", *paths)
    whole = evaluate(capsys, run, "--benchmark", "choices", "--data.path", write(tmp_path / "c.jsonl", ROWS))
    assert both[0].startswith(f"{paths[0]}  accuracy ") and both[0].endswith("4 items")
    assert both[2].split(None, 1) == ["total", whole[0]]


def test_examples_are_fixed_by_the_seed_and_never_the_question_itself(run, tmp_path, capsys):
    items = [item(row, "choices") for row in ROWS]
    first, again, other = (choose_shots(items, 3, seed) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 4
    for one in items:
        [prompt] = set(prompts(one, first, 3))
        *shown, question = prompt.split("\n\n")
        assert question == one.contexts[0] and len(shown) == 3 and one.shown not in shown
    assert first[0].shown == first[0].contexts[0] + first[0].continuations[first[0].answer]
    data, shots = write(tmp_path / "c.jsonl", ROWS), write(tmp_path / "shots.jsonl", ROWS[:2])
    args = ("--benchmark", "choices", "--data.path", data, "--shots", "1", "--shots_path", shots)
    results = [evaluate(capsys, run, *args, "--seed", seed) for seed in (0, 0, 3)]
    assert results[0] == results[1] and results[0][0] != evaluate(capsys, run, *args[:4])[0]
    assert results[0][1] == f"benchmark   choices, 1 examples from {shots} (seed 0)"
    assert "there are 2 rows to choose from" in fails(capsys, run, *args[:4], "--shots_path", shots, "--shots", "5")


def test_a_context_that_is_too_long_is_cut_and_counted(run, tmp_path, capsys):
    rows = [{"context": "x" * 90, "choices": ["a", "b"], "answer": "b"}, ROWS[0]]
    lines = evaluate(capsys, run, "--benchmark", "choices", "--data.path", write(tmp_path / "c.jsonl", rows))
    assert lines[3].endswith("c.jsonl: 1 items were cut at their start to the 32 tokens that the model reads")


def test_an_answer_that_is_not_published_is_left_out_and_counted(run, tmp_path, capsys):
    rows = [*ROWS, {"context": "x", "choices": ["a", "b"], "answer": -1}, {**ROWS[0], "answer": None}]
    data = write(tmp_path / "c.jsonl", rows)
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", run.run_dir, "--benchmark", "choices", "--data.path", str(data)]) == 0
    out, err = capsys.readouterr()
    assert "11 items" in out and "2 left out: without an answer" in out + err


LETTERS = {"label": ["A", "B"], "text": ["sun", "moon"]}
FORMATS = [
    ("choices", {"context": "a", "choices": ["b", " c"], "answer": " c"}, ["a"] * 2, [" b", " c"], 1),
    ("choices", {"context": "a ", "choices": ["b", "c"], "answer": "0"}, ["a "] * 2, ["b", "c"], 0),
    (
        "hellaswag",
        {
            **{"activity_label": "Swimming", "ctx_a": "A man [title] swims.", "ctx_b": "he"},
            **{"endings": ["stops [substeps] now.", "runs."], "label": "1", "ctx": "unused", "ind": 3},
        },
        ["Swimming: A man. swims. He"] * 2,
        [" stops now.", " runs."],
        1,
    ),
    ("lambada", {"text": "He said no word"}, ["He said no"], [" word"], 0),
    (
        "arc",
        {"question": {"stem": "Which?", "choices": [{"text": "sun", "label": "A"}, {"text": "moon", "label": "B"}]},
         "answerKey": "B"},
        ["Question: Which?\nAnswer:"] * 2,
        [" sun", " moon"],
        1,
    ),
    ("arc", {"question": "Which?", "choices": LETTERS, "answerKey": "A"}, ["Question: Which?\nAnswer:"] * 2,
     [" sun", " moon"], 0),
    ("piqa", {"goal": "Cut", "sol1": "knife", "sol2": "spoon", "label": 0}, ["Question: Cut\nAnswer:"] * 2,
     [" knife", " spoon"], 0),
    (
        "winogrande",
        {"sentence": "Ann saw Eve as _ was near.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        ["Ann saw Eve as Ann", "Ann saw Eve as Eve"],
        [" was near."] * 2,
        1,
    ),
    ("boolq", {"passage": "P.", "question": "is it", "answer": True}, ["P.\nQuestion: is it?\nAnswer:"] * 2,
     [" no", " yes"], 1),
    ("boolq", {"passage": "P.", "question": "is it", "label": 0}, ["P.\nQuestion: is it?\nAnswer:"] * 2,
     [" no", " yes"], 0),
    (
        "mmlu",
        {"question": "Q ", "choices": ["w", "x", "y", "z"], "answer": 2, "subject": "s"},
        ["Q\nA. w\nB. x\nC. y\nD. z\nAnswer:"] * 4,
        [" A", " B", " C", " D"],
        2,
    ),
    ("generate", {"context": "1+1=", "answer": [2, "two"]}, ["1+1="], [" 2"], 0),
]  # fmt: skip


@pytest.mark.parametrize(("benchmark", "row", "contexts", "continuations", "answer"), FORMATS)
def test_rows_of_public_formats(benchmark, row, contexts, continuations, answer):
    found = item(row, benchmark)
    assert [*found.contexts] == contexts and [*found.continuations] == continuations and found.answer == answer


def test_every_benchmark_that_the_option_names_has_a_reader():
    named = get_args(get_type_hints(EvaluateConfig)["benchmark"])
    assert {*named} == {"none", *READERS} and {name for name, *_ in FORMATS} == {*READERS}


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("choices", {"context": "a", "choices": ["b", "c"], "answer": 2}, "answer=2 must be a number from 0 to 1"),
        ("choices", {"context": "a", "choices": ["b"], "answer": 0}, "has 1 choices, must have at least 2"),
        ("choices", {"context": "a", "choice": ["b"], "answer": 0}, "no field 'choices' (benchmark); it has"),
        ("arc", {"question": "Which?", "choices": LETTERS, "answerKey": "E"}, "must be the label of one of its"),
        ("winogrande", {"sentence": "no", "option1": "a", "option2": "b", "answer": 1}, "needs a blank '_'"),
        ("boolq", {"passage": "P.", "question": "q", "answer": "maybe"}, "must be true or false"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b"}, "no field 'label'"),
    ],
)
def test_wrong_rows_are_named(benchmark, row, message):
    with pytest.raises(UserError, match=f"f:1: .*{re.escape(message)}"):
        item(row, benchmark)


def test_csv_of_mmlu_has_no_line_of_column_names(tmp_path):
    lines = ['"Which, one?",w,w,y,z,B', "Two?,1,2,3,4,D"]
    (tmp_path / "bare.csv").write_text("\n".join(lines))
    (tmp_path / "named.csv").write_text("\n".join(["question,A,B,C,D,answer", *lines]))
    columns = ("question", "A", "B", "C", "D", "answer")
    for name in ("bare.csv", "named.csv"):
        rows = list(read_rows([str(tmp_path / name)], "data.path", names=columns))
        found = list(read_items("mmlu", rows, Counter()))
        assert [one.answer for one in found] == [1, 3] and found[0].contexts[0].startswith("Which, one?\nA. w\nB. w")


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 42 \n", "", "42"),
        ("so it is #### 7 apples", r"#### (\d+)", "7"),
        ("so it is 7", r"\d+", "7"),
        ("nothing", r"\d+", None),
    ],
)
def test_answers_are_extracted(text, pattern, answer):
    assert extract_answer(text, pattern) == answer


def test_standard_errors_are_those_of_a_sample():
    found = mean(np.array([1.0, 0.0, 0.0, 1.0, 1.0]))
    assert found.value == 0.6 and found.error == pytest.approx(np.std([1, 0, 0, 1, 1], ddof=1) / np.sqrt(5))


def test_scores_of_texts_take_the_best_of_several_accepted_answers():
    pytest.importorskip("sacrebleu", reason="needs the extra gptjax[evaluate]")
    pytest.importorskip("rouge_score", reason="needs the extra gptjax[evaluate]")
    long = "the quick brown fox jumps over the lazy dog"
    assert (
        text_scores(np.array([long, long], object), [(long,), ("no", long)])
        == "BLEU 100.00 · chrF 100.00 · ROUGE-L 1.0000 ± 0.0000"
    )
    found = text_scores(["a b c d"], [("a x c",)])  # longest common part a c: precision 2/4, recall 2/3
    assert "ROUGE-L 0.5714" in found and "BLEU 100" not in found


@pytest.mark.slow
def test_generated_answers_are_compared(run, tmp_path, capsys):
    """The answers are those of `gptjax sample`, greedily, up to the stop string."""
    contexts = ["aaa 1\nbbb", "ccc 3\nddd 4\neee", "f"]
    argv = ["sample", "--run_dir", run.run_dir, "--temperature", "0", "--max_new_tokens", "8", "--prompt", *contexts]
    capsys.readouterr()
    assert main(argv) == 0
    printed = capsys.readouterr().out
    loaded = load_run(Path(run.run_dir))
    ids, texts = [list(context.encode()) for context in contexts], []
    for tokens in ids:
        for _ in range(8):
            tokens.append(int(log_probabilities(loaded.config.model, loaded.params, tokens)[-1].argmax()))
        texts.append(bytes(tokens[-8:]).decode("utf-8", "replace"))
    assert all(text in printed for text in texts)
    stop = texts[0][4]
    answers = [text.split(stop)[0] for text in texts]
    rows = [
        {"context": c, "answer": a if n != 2 else ["no", "x" + a]}
        for n, (c, a) in enumerate(zip(contexts, answers, strict=True))
    ]
    data = write(tmp_path / "g.jsonl", rows)
    args = ("--benchmark", "generate", "--data.path", data, "--max_new_tokens", "8", "--stop", stop)
    lines = evaluate(capsys, run, *args, "--batch_size", "2")
    assert lines[0].startswith("exact match 0.6667 ± 0.3333 · 3 items")
    assert lines[0] != evaluate(capsys, run, *args, "--pattern", "nothing like this")[0]
    if importlib.util.find_spec("sacrebleu") and importlib.util.find_spec("rouge_score"):
        assert evaluate(capsys, run, *args, "--text_scores", "true")[1].startswith("scores      BLEU ")
    assert "is not a regular expression" in fails(capsys, run, *args, "--pattern", "(")
    assert "pattern='x' has no effect" in fails(
        capsys, run, "--benchmark", "choices", "--data.path", "x", "--pattern", "x"
    )
    assert "benchmark=mmlu needs rows" in fails(capsys, run, "--benchmark", "mmlu")
