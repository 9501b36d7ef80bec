"""Scores of labels compared with scikit-learn, which gptjax itself does not need."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from scipy.special import softmax
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from gptjax.batches.packed import encode_words
from gptjax.config.data import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.evaluation.labels import Predictions, are_spans, confusion, per_label, score, with_labels
from gptjax.evaluation.predict import predict_words
from gptjax.model.heads import label_loss
from gptjax.tasks.registry import read_examples
from gptjax.text.tokenizers.plain import ByteTokenizer
from gptjax.training import setup
from tests.faults.runs import SHARED_CACHE

LABELS = tuple("abcdef")


def random_predictions(seed: int, several: bool) -> Predictions:
    """Examples: none has label a, b is never predicted, and no example has or gets label c."""
    random = np.random.default_rng(seed)
    probabilities = random.random((60, 6)).astype(np.float32)
    probabilities[:, [1, 2]] = 0.0
    targets = random.integers(0, 2, (60, 6)) if several else random.choice([1, 3, 4, 5], 60)
    if several:
        targets[:, [0, 2]] = 0
    return Predictions(probabilities, targets, LABELS)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed, several):
    predictions = random_predictions(seed, several)
    truth, chosen = predictions.targets, predictions.chosen
    found = score(predictions, 0.5)
    assert found.accuracy == pytest.approx(accuracy_score(truth, chosen))
    assert found.macro_f1 == pytest.approx(f1_score(truth, chosen, average="macro", zero_division=0.0))
    each = per_label(predictions)
    expected = precision_recall_fscore_support(truth, chosen, labels=range(6), zero_division=0.0)
    for one, other in zip((each.precision, each.recall, each.f1, each.support), expected, strict=True):
        np.testing.assert_allclose(one, other)
    if not several:
        np.testing.assert_array_equal(confusion(predictions), confusion_matrix(truth, chosen, labels=range(6)))


def test_span_tags_are_recognised():
    assert are_spans(("B-X", "I-X", "O")) and not are_spans(("B-X", "NOUN")) and not are_spans(())


def test_a_tag_that_training_has_not_seen_is_counted_and_wrong_and_has_no_loss(tmp_path):
    for name, tags in (("train", "x y"), ("validation", "x new")):
        lines = (f"{word}\t{tag}" for word, tag in zip("ab", tags.split(), strict=True))
        (tmp_path / f"{name}.conll").write_text("\n".join(lines) + "\n")
    task = TaskConfig(kind="tag", validation_path=(str(tmp_path / "validation.conll"),))
    found = read_examples(task, DataConfig(path=(str(tmp_path / "train.conll"),)))
    assert found.labels == ("x", "y")
    assert found.notes == ("1 words to validate on have a tag that training has not seen: they count as wrong",)

    words = encode_words(found.validation, ByteTokenizer(), found.labels, 8, 0)
    logits_N = np.array([1.0, 0.0], np.float32)

    def predict(_params, batch):
        logits_BTN = np.broadcast_to(logits_N, (*batch.targets.shape, 2))
        loss = label_loss(logits_BTN, batch.targets, np.ones(batch.targets.shape, np.float32))
        return softmax(logits_BTN, axis=-1), np.stack([loss.nll, loss.count])

    predictions, loss = predict_words(predict, {}, words, 2, SingleDeviceSharding(jax.devices()[0]))
    assert predictions.named() == ([["x", "x"]], [["x", "new"]])
    assert loss == pytest.approx(np.log(1 + np.exp(-1)))
    assert score(predictions, loss).accuracy == 0.5
    other = with_labels(predictions, ("older", "y", "new", "x"))
    assert other.named() == predictions.named() and score(other, loss).accuracy == 0.5


BLOCKED = """
import sys
for name in ("sklearn", "seqeval", "matplotlib"):
    sys.modules[name] = None  # importing it is an ImportError
from gptjax.cli import main
sys.exit(main(sys.argv[1:]))
"""


def blocked(*args: object) -> subprocess.CompletedProcess[str]:
    """Runs a verb as if the extra `finetune` were not installed."""
    command = [sys.executable, "-c", BLOCKED, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.mark.slow
def test_the_base_install_trains_and_scores_a_classifier(tmp_path):
    rows = [{"text": f"{word} {n}", "label": "ab"[n % 2]} for n, word in enumerate(["aa", "bb", "ab", "ba", "cc"] * 8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("--model.n_layer", 1, "--model.n_embd", 8, "--model.n_head", 1, "--model.block_size", 16)
    steps = ("--train.num_steps", 2, "--train.batch_size", 4, "--data.validation_fraction", 0.5)
    common = ("--tokenizer.kind", "bytes", "--run_dir", tmp_path / "run", "--cache_dir", SHARED_CACHE, *sizes, *steps)
    rows_of = ("--task.kind", "classify", "--data.path", tmp_path / "rows.jsonl")
    done = blocked("train", *rows_of, *common)
    assert done.returncode == 0, done.stderr
    assert "macro F1" in done.stdout
    scored = blocked("evaluate", "--run_dir", tmp_path / "run")
    assert scored.returncode == 0 and "precision" in scored.stdout and "(predicted)" in scored.stdout


@pytest.mark.slow
def test_spans_need_seqeval_and_other_tags_do_not(tmp_path):
    for tags, refused in ((("B-X", "O"), True), (("NOUN", "VERB"), False)):
        sentence = "".join(f"w{n}\t{tags[n % 2]}\n" for n in range(6))
        (tmp_path / "rows.conll").write_text("\n".join(f"x{n}\t{tags[0]}\n{sentence}" for n in range(20)))
        sizes = ("--model.n_layer", 1, "--model.n_embd", 8, "--model.n_head", 1, "--model.block_size", 16)
        train = ("--train.num_steps", 0 if refused else 1, "--train.batch_size", 2)
        done = blocked("train", "--task.kind", "tag", "--data.path", tmp_path / "rows.conll", "--tokenizer.kind",
                       "bytes", "--run_dir", tmp_path / tags[0], "--cache_dir", SHARED_CACHE, *sizes,
                       *(train if not refused else ()))  # fmt: skip
        assert ("the scores of spans need seqeval" in done.stderr) == refused, done.stderr
        assert done.returncode == (2 if refused else 0)


def test_best_by_takes_precedence_over_the_loss():
    loop = setup.Loop(best_by="accuracy")
    assert loop.take(1.0, 0.5) and not loop.take(0.1, 0.4) and loop.evaluations_since_best == 1
    assert loop.take(0.9, 0.5), "of equal scores the lower loss is better"
    assert not loop.take(0.9, 0.5)
    assert (loop.best_score, loop.best_loss, loop.evaluations_since_best) == (0.5, 0.9, 1)
