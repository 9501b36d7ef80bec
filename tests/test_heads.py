"""Tasks whose head reads whole texts: numbers, pairs, candidates, and the language model beside them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import xxhash

from gptjax.batches.labelled import Marks, TextSet, encode_rows
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.reader import load_config
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.evaluation.numbers import NumberPredictions, pearson, ranks, score_numbers
from gptjax.model import bag, gpt
from gptjax.model.gpt import Compute
from gptjax.model.inputs import BlockInputs
from gptjax.report.metrics import read_metrics
from gptjax.tasks.classify import HEAD
from gptjax.tasks.heads import make_predict
from gptjax.tasks.registry import make_loss, parse, read_examples
from gptjax.tasks.regress import with_moments
from gptjax.tasks.texts import encode_choices, encode_examples
from gptjax.text.formats import Row
from gptjax.text.labelled import Choice, Numbers, Text
from gptjax.text.ngrams import BUCKETS, HALF, ngram_counts
from gptjax.text.tokenizer import make_tokenizer
from gptjax.training import trainer
from tests.tiny import MODEL, hidden_states, init_all, replace, run_config

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), lambda: [])
END = BYTES.end_of_text
CONFIG = replace(
    Config(model=dataclasses.replace(MODEL, vocab_size=257, block_size=32)), train={"compute_dtype": "float32"}
)
PAIRS = [Text("ab", ("x",), "", second="cde"), Text("fghij", ("y",), "", second="k"), Text("l", ("x",), "", second="m")]


def task_config(**task) -> Config:
    return dataclasses.replace(CONFIG, task=TaskConfig(**task))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def mean_states(config: Config, params: dict, ids) -> np.ndarray:
    """The mean over the final hidden states of one unpadded sequence, float64 `[D]`."""
    ids = np.asarray(ids, np.int32)[None]
    return np.asarray(hidden_states(config.model, params, ids, np.arange(ids.shape[1])[None])[0], np.float64).mean(0)


def outputs(config: Config, params: dict, rows) -> np.ndarray:
    batch = rows.batch(np.arange(len(rows.tokens)), rows.tokens, np.ones(len(rows.tokens)))
    found, _ = jax.jit(make_predict(config.model, config.task, config.task.kind, Compute()))(params, batch)
    return np.asarray(found)


def test_a_layer_mixture_is_the_softmax_weighted_sum_of_all_normalised_layers():
    config = task_config(kind="regress", means=(0.0,), deviations=(1.0,), layer_mixture=True)
    model, params = config.model, init_all(config, jax.random.key(0))
    head = params["heads"]["regress"]
    assert head["mix"].shape == (model.n_layer + 1,)
    head |= {"mix": np.array([0.3, -1.0, 2.0], np.float32), "scale": np.float32(1.7)}
    ids = np.array([[5, 1, 4, 2]], np.int32)
    positions = np.arange(4)[None]
    layers = [jax.jit(gpt.embed_tokens, static_argnums=0)(model, params, ids, positions)]
    one = dataclasses.replace(model, n_layer=1)
    for layer in range(model.n_layer):
        block = params | {"blocks": jax.tree.map(lambda leaf, n=layer: leaf[n : n + 1], params["blocks"])}
        apply = jax.jit(lambda params, x, n=layer: gpt.apply_blocks(one, params, x, BlockInputs(positions), first=n)[0])
        layers.append(apply(block, layers[-1]))
    states_LD = np.stack([np.asarray(gpt.final_norm(model, params, x))[0].mean(0) for x in layers])
    expected = 1.7 * softmax(head["mix"].astype(np.float64)) @ states_LD @ np.asarray(head["w"][0])
    found = outputs(config, params, TextSet([ids[0]], np.zeros((1, 1), np.float32), np.zeros(1, bool), 32))
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-4)  # float32 sums in another order
    rows = TextSet([ids[0]], np.ones((1, 1), np.float32), np.zeros(1, bool), 32)
    batch = rows.batch(np.arange(1), [ids[0]], np.ones(1))
    loss = make_loss(config, Compute(unroll=1))
    gradient = jax.jit(jax.grad(lambda head: loss(params | {"heads": {"regress": head}}, batch, None).objective))(head)
    assert np.all(np.asarray(gradient["mix"]) != 0) and gradient["scale"] != 0


@pytest.mark.parametrize(("longest", "share"), [(1, 0.75), (3, 0.4)])
def test_a_bag_of_words_is_a_linear_model_over_tf_idf_beside_the_head(longest, share):
    text = pytest.importorskip("sklearn.feature_extraction.text", reason="needs scikit-learn (the extra finetune)")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["a", "Be", "bee", "Cedar", "déjà"], size)) for size in (6, 1, 9, 9, 12, 4)]
    expected_B, words_MN = np.zeros(len(texts)), np.zeros((BUCKETS, 2), np.float32)
    for options, first in (
        ({"ngram_range": (1, longest), "token_pattern": r"\w+"}, 0),
        ({"ngram_range": (3, 5), "analyzer": "char_wb"}, HALF),
    ):
        vectorizer = text.TfidfVectorizer(sublinear_tf=True, **options)
        tf_idf = vectorizer.fit_transform(texts)
        weights = random.normal(size=len(vectorizer.vocabulary_)).astype(np.float32)
        expected_B += share * bag.SCALE * (tf_idf @ weights)
        for name, weight in zip(vectorizer.get_feature_names_out(), weights, strict=True):
            words_MN[first + xxhash.xxh32_intdigest(name.encode()) % HALF, 0] = weight

    config = task_config(kind="classify", labels=("x", "y"), bag_of_words=longest, bag_share=share, max_tokens=128)
    config = replace(config, model={"block_size": 128})
    rows = encode_examples(config, BYTES, [Text(one, (), "") for one in texts], np.zeros(len(texts), np.int32))
    params = init_all(config, jax.random.key(0), {"heads": {"classify": HEAD.constants(config, rows)}})
    odds_without_B, odds_B = (
        np.log(p_BN[:, 0] / p_BN[:, 1])
        for words in (np.zeros_like(words_MN), words_MN)
        for p_BN in [
            outputs(config, params | {"heads": {"classify": params["heads"]["classify"] | {"words": words}}}, rows)
        ]
    )
    # float32 log-probabilities near 0 and 1
    np.testing.assert_allclose(odds_B - odds_without_B, expected_B, rtol=1e-3, atol=2e-3)


def test_a_model_and_its_bag_of_words_learn_from_losses_of_their_own():
    config = task_config(kind="classify", labels=("x", "y"), bag_of_words=1)
    rows = encode_examples(config, BYTES, [Text("ab", (), ""), Text("cd", (), "")], np.array([0, 1], np.int32))
    batch, params = rows.batch(np.arange(2), rows.tokens, np.ones(2)), init_all(config, jax.random.key(0))
    other = jax.tree.map(np.copy, params)
    other["heads"]["classify"]["w"] *= 100
    loss = make_loss(config, Compute())
    gradient = jax.jit(jax.grad(lambda params: loss(params, batch, None).objective))
    one, two = (gradient(side)["heads"]["classify"] for side in (params, other))
    assert np.asarray(one["words"]).any() and not np.allclose(one["bias"], two["bias"])
    np.testing.assert_array_equal(one["words"], two["words"])


def test_the_ngrams_of_a_text_are_those_of_its_tokens_and_padding_has_none():
    config = task_config(kind="classify", labels=("x",), bag_of_words=1, max_tokens=9)
    examples = [Text("ab abcdefgh", (), ""), Text("ab abcd", (), ""), Text("b", (), "")]
    rows = encode_examples(config, BYTES, examples, np.zeros(3, np.int32))
    assert rows.cut.tolist() == [True, False, False]
    batch = rows.batch(np.array([0, 1, 2, -1]), [*rows.tokens, np.empty(0, np.int32)], np.ones(4))
    cut, whole, short, nothing = (
        {b: n for b, n in zip(*row, strict=True) if n} for row in zip(batch.buckets, batch.counts, strict=True)
    )
    assert cut == whole and cut == dict(zip(*ngram_counts("ab abcd", 1), strict=True))
    assert len(short) == 2 and not nothing  # the word, and the characters of " b "


def test_words_of_a_cut_pair_stay_apart():
    config = task_config(kind="classify", labels=("x",), bag_of_words=1, max_tokens=12, second_field="b")
    rows = encode_examples(config, BYTES, [Text("cats", (), "", second="dogs bark")], np.zeros(1, np.int32))
    assert rows.cut.all()
    found, words = set(rows.ngrams[0][0].tolist()), set(ngram_counts("cats", 1)[0].tolist())
    assert words < found and found <= set(ngram_counts("cats\ndogs b", 1)[0].tolist()) | words | set(
        ngram_counts("dogs", 1)[0].tolist()
    )


def test_texts_with_about_as_many_ngrams_share_a_program():
    config = task_config(kind="classify", labels=("x",), bag_of_words=2, max_tokens=64)
    shapes = set()
    for text in ("hello world, again", "another text here", "some other words"):
        rows = encode_examples(config, BYTES, [Text(text, (), "")], np.zeros(1, np.int32))
        shapes.add(rows.batch(np.zeros(1, int), rows.tokens, np.ones(1)).buckets.shape)
    assert shapes == {(1, 64)}


def test_scores_of_numbers_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).integers(0, 6, (2, 40)).astype(float)  # with ties
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert pearson(ranks(a), ranks(b)) == pytest.approx(stats.spearmanr(a, b).statistic)
    np.testing.assert_array_equal(ranks(a), stats.rankdata(a))
    scores = score_numbers(NumberPredictions(np.stack([a, a], 1), np.stack([a, -a], 1)), 0.0)
    assert scores.pearson == pytest.approx(0.0) and scores.mae == pytest.approx(np.abs(a).mean())
    assert pearson(a, np.ones(40)) == 0.0


def test_a_row_of_two_texts_has_marks_around_them_and_loses_the_end_of_the_longer_one():
    marks = Marks((300,), (301,), (302,))
    tokens, cut = encode_rows([("ab", "cde"), ("abcdefgh", "xy"), ("abcdefgh", "ABCDEFGH")], BYTES, marks, 9)
    expected = [[300, *b"ab", 301, *b"cde", 302], [300, *b"abcd", 301, *b"xy", 302], [300, *b"abc", 301, *b"ABC", 302]]
    assert [ids.tolist() for ids in tokens] == expected and cut.tolist() == [False, True, True]
    chars = make_tokenizer(TokenizerConfig(kind="chars"), lambda: ["abcde"])
    with pytest.raises(UserError, match=r"no end-of-text token to put between.*task.delimiters=learned"):
        encode_rows([("a", "b")], chars, Marks((), (), ()), 9)


@pytest.mark.parametrize("delimiters", ["end_of_text", "learned"])
def test_a_pair_is_read_as_start_first_delimiter_second_extract(delimiters):
    config = task_config(kind="classify", labels=("x", "y"), second_field="b", delimiters=delimiters)
    params = init_all(config, jax.random.key(0))
    head, read = params["heads"]["classify"], params
    marks = (END, END, END)
    if delimiters == "learned":  # three more rows of the table
        table = np.concatenate([params["embed"]["tokens"], head["tokens"]])
        read = params | {"embed": params["embed"] | {"tokens": table}}
        marks = tuple(range(len(table) - 3, len(table)))
    rows = encode_examples(config, BYTES, PAIRS, np.zeros(3, np.int32))
    for pair, found in zip(PAIRS, outputs(config, params, rows), strict=True):
        ids = [marks[0], *pair.text.encode(), marks[1], *pair.second.encode(), marks[2]]
        logits = np.asarray(head["w"]) @ mean_states(config, read, ids) + np.asarray(head["bias"])
        np.testing.assert_allclose(found, softmax(logits), rtol=1e-4)


def test_both_orders_add_their_representations():
    config = task_config(kind="regress", second_field="b", both_orders=True, means=(0.0,), deviations=(1.0,))
    params = init_all(config, jax.random.key(1))
    pairs = [Numbers(p.text, (0.0,), "", p.second) for p in PAIRS]
    turned = [Numbers(p.second, (0.0,), "", p.text) for p in pairs]
    found, again = (
        outputs(config, params, encode_examples(config, BYTES, side, np.zeros((3, 1), np.float32)))
        for side in (pairs, turned)
    )
    np.testing.assert_allclose(found, again, rtol=1e-5)  # the sums are the same, in another order
    head = params["heads"]["regress"]
    for pair, value in zip(pairs, found, strict=True):
        first, second = pair.text.encode(), pair.second.encode()
        sides = [[END, *a, END, *b, END] for a, b in ((first, second), (second, first))]
        total = sum(mean_states(config, params, ids) for ids in sides)
        np.testing.assert_allclose(value, np.asarray(head["w"]) @ total + np.asarray(head["bias"]), rtol=1e-4)
    alone = dataclasses.replace(config, task=dataclasses.replace(config.task, both_orders=False))
    assert not np.allclose(outputs(alone, params, encode_examples(alone, BYTES, pairs, np.zeros((3, 1)))), found)


def test_candidates_share_one_softmax_however_many_there_are():
    config = task_config(kind="choose")
    params = init_all(config, jax.random.key(2))
    examples = [Choice("q", ("a", "bc", "d"), 1, ""), Choice("rst", ("e", "f"), 0, "")]
    rows = encode_choices(config, BYTES, examples)
    head, found, nll = params["heads"]["choose"], outputs(config, params, rows), 0.0
    for example, probabilities in zip(examples, found, strict=True):
        vectors = [
            mean_states(config, params, [END, *example.text.encode(), END, *candidate.encode(), END])
            for candidate in example.candidates
        ]
        expected = softmax(np.stack(vectors) @ np.asarray(head["w"])[0])
        np.testing.assert_allclose(probabilities[: len(expected)], expected, rtol=1e-4)
        assert (probabilities[len(expected) :] == 0).all()
        nll -= np.log(expected[example.answer])
    loss = jax.jit(make_loss(config, Compute()))(params, rows.batch(np.arange(2), rows.tokens, np.ones(2)), None)
    assert float(loss.nll) == pytest.approx(nll, rel=1e-4) and float(loss.count) == 2


@pytest.mark.parametrize("kind", ["regress", "classify"])
def test_the_auxiliary_loss_is_the_mean_over_tokens_times_its_weight(kind):
    more = {"means": (2.0,), "deviations": (4.0,)} if kind == "regress" else {"labels": ("x", "y")}
    config = task_config(kind=kind, second_field="b", delimiters="learned", lm_weight=0.5, **more)
    params = init_all(config, jax.random.key(3))
    targets = np.array([[0.5], [-1.0], [2.0]], np.float32) if kind == "regress" else np.array([0, 1, 0], np.int32)
    rows = encode_examples(config, BYTES, PAIRS, targets)
    loss = jax.jit(make_loss(config, Compute()))(params, rows.batch(np.arange(3), rows.tokens, np.ones(3)), None)
    table = np.concatenate([params["embed"]["tokens"], params["heads"][kind]["tokens"]])
    read, nlls = params | {"embed": params["embed"] | {"tokens": table}}, []
    for ids in rows.tokens:
        states = hidden_states(config.model, read, ids[None], np.arange(len(ids))[None])
        logits = np.asarray(gpt.logits(config.model, params, states)[0], np.float64)
        nlls += [-np.log(softmax(logits[t])[after]) for t, after in enumerate(ids[1:]) if after < 257]
    assert len(nlls) == sum(len(p.text) + len(p.second) for p in PAIRS), "learned tokens are no targets"
    mean = float(loss.extras["lm_loss"]) / 3
    assert mean == pytest.approx(np.mean(nlls), rel=1e-4)
    assert float(loss.objective) == pytest.approx(float(loss.nll) + 3 * 0.5 * np.mean(nlls), rel=1e-4)
    if kind == "regress":
        predicted = outputs(config, params, rows)
        assert float(loss.nll) == pytest.approx(((predicted - targets) ** 2).sum(), rel=1e-4)


def test_numbers_are_standardized_by_the_training_rows(tmp_path):
    rows = [{"text": f"t{n}", "label": [n, -2.0 * n]} for n in range(1, 6)] + [{"text": "u", "label": [None, 1.0]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = TaskConfig(kind="regress", validation_path=(path,))
    examples = read_examples(config, DataConfig(path=(path,)))
    task = with_moments(config, examples)
    assert task.means == (3.0, -6.0) and task.deviations == pytest.approx((np.sqrt(2), 2 * np.sqrt(2)))
    assert len(examples.train) == 5 and "2 left out: without a number" in examples.notes[0]  # in both files
    given = dataclasses.replace(config, means=(0.0, 0.0), deviations=(1.0, 1.0))
    assert with_moments(given, examples) == given


WRONG = [
    ({"kind": "classify", "second_field": "b"}, {"text": "a", "label": "x"}, "r:1: .*'b'.*task.second_field"),
    ({"kind": "classify", "second_field": "b"}, {"text": "a", "b": " ", "label": "x"}, "r:1: field 'b' is an empty"),
    ({"kind": "regress"}, {"text": "a", "label": "good"}, "r:1: field 'label' holds 'good'; .* needs a number"),
    ({"kind": "regress"}, {"text": "a", "label": []}, "r:1: field 'label' is an empty list"),
    ({"kind": "choose"}, {"text": "a", "candidates": ["b", "c"], "label": 2}, "r:1: .* holds 2; .* from 0 to 1"),
    ({"kind": "choose"}, {"text": "a", "candidates": ["b"], "label": 0}, "r:1: .*has 1 candidate.*needs two"),
    ({"kind": "choose"}, {"text": "a", "candidates": ["b", ""], "label": 0}, "r:1: candidate 1 of .* must be a text"),
    ({"kind": "choose", "candidates_field": "c"}, {"text": "a", "candidates": [], "label": 0}, "r:1: .*candidates_f"),
]


@pytest.mark.parametrize("task, row, message", WRONG)
def test_a_wrong_row_is_named(task, row, message):
    with pytest.raises(UserError, match=message):
        list(parse([Row(row, "r:1")], TaskConfig(**task), DataConfig()))


def test_the_number_of_numbers_is_the_same_in_all_rows(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": [1, 2]}])
    config = TaskConfig(kind="regress", validation_path=(path,))
    with pytest.raises(UserError, match=r"a.jsonl:2: has 2 number\(s\), must have 1"):
        with_moments(config, read_examples(config, DataConfig(path=(path,))))
    path = write_rows(tmp_path / "b.jsonl", [{"text": "a", "label": 7}, {"text": "b", "label": 7}])
    config = TaskConfig(kind="regress", validation_path=(path,))
    with pytest.raises(UserError, match=r"b.jsonl:1: number 0 of .* is 7.0 in all 2 training rows"):
        with_moments(config, read_examples(config, DataConfig(path=(path,))))


def test_the_text_of_a_candidate_is_an_answer_too():
    rows = [Row({"text": "a", "candidates": ["b", "c", "1"], "label": label}, "") for label in ("c", 2, "0", "1")]
    assert [e.answer for e in parse(rows, TaskConfig(kind="choose"), DataConfig())] == [1, 2, 0, 2]


RUNS = {
    "regress": ({"second_field": "b", "both_orders": True, "delimiters": "learned", "lm_weight": 0.5}, "Pearson"),
    "choose": ({"candidates_field": "options"}, "a guess has"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_trained_measured_and_used(tmp_path, capsys, kind):
    task, said = RUNS[kind]
    label = {"regress": lambda n: 3.0 + n % 2, "choose": lambda n: n % 2}[kind]
    rows = [
        {"text": f"{n} {'ab'[n % 2]}", "b": "cd"[n % 2], "options": ["x", "yy", "z"][: 2 + n % 2], "label": label(n)}
        for n in range(24)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = run_config(tmp_path, train={"num_steps": 4, "eval_windows": 512, "eval_every": 2, "save_every": 0})
    config = replace(config, data={"path": (path,), "validation_fraction": 0.3}, task=TaskConfig(kind=kind, **task))
    assert trainer.train(config) == 0
    metrics = read_metrics(Path(config.run_dir))
    score = "pearson" if kind == "regress" else "accuracy"
    assert all(np.isfinite(row["val_loss"]) and -1 <= row[score] <= 1 for row in metrics if "val_loss" in row)
    assert all(("lm_loss" in row) == (kind == "regress") for row in metrics if "loss" in row)
    last = [row for row in metrics if "val_loss" in row][-1]
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", config.run_dir, "--checkpoint", "latest"]) == 0
    printed = capsys.readouterr().out
    assert said in printed and f"loss {last['val_loss']:.4f}" in printed
    assert main(["predict", "--run_dir", config.run_dir, "--file", path]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 24
    if kind == "regress":
        stored = load_config(Path(config.run_dir) / "config.yaml").task
        assert 3.0 < stored.means[0] < 4.0
        assert all(abs(row["predicted"] - stored.means[0]) < 5 * stored.deviations[0] for row in found)
    else:
        assert all(len(row["probabilities"]) == len(row["options"]) > row["predicted"] for row in found)
    assert main(["predict", "--run_dir", config.run_dir, "--text", "a"]) == 2
    assert "give --file" in capsys.readouterr().err
