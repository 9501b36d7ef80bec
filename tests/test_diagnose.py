"""Diagnostics: groups and scores against plain counting, and the predictions against the measured loss."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.batches.pretraining import Batch, PackedWindows
from gptjax.cli import main
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.evaluation.diagnose import (
    Predictions,
    by_confidence,
    by_frequency,
    by_position,
    calibration_error,
    predict_targets,
    repetition,
    used_context,
)
from gptjax.evaluation.loss import make_eval_step, measure
from gptjax.model.gpt import Compute
from gptjax.text.prepare import prepare
from gptjax.text.tokenizer import load_tokenizer
from gptjax.training import trainer
from gptjax.verbs.data import step_lines
from gptjax.verbs.own_text import open_own_text
from tests.faults.inputs import refused
from tests.tiny import MODEL, init_params, make_batch, run_config, untrained_run


def predictions(**arrays) -> Predictions:
    n = len(next(iter(arrays.values())))
    zero = {name: np.zeros(n, int) for name in ("targets", "positions")}
    zero |= {name: np.zeros(n) for name in ("nll", "top_probability")}
    return Predictions(**(zero | {"correct": np.zeros(n, bool)} | arrays))


def test_positions_are_grouped_in_ranges_that_double():
    nll = np.arange(20.0)[::-1]
    groups = by_position(predictions(positions=np.arange(20), nll=nll))
    assert [(g.name, g.count) for g in groups] == [
        ("0", 1),
        ("1", 1),
        ("2-3", 2),
        ("4-7", 4),
        ("8-15", 8),
        ("16-31", 4),
    ]
    assert [g.loss for g in groups] == [19, 18, 16.5, 13.5, 7.5, 1.5]
    assert used_context(groups) == "16-31"
    flat = by_position(predictions(positions=np.arange(20), nll=np.maximum(5 - np.arange(20.0), 2)))
    assert used_context(flat) == "4-7", "from position 3 on the loss is 2; 4-7 is the first range that is all of it"


def test_targets_are_grouped_by_how_often_they_were_trained_on():
    counts = np.array([0, 1, 9, 10, 99, 100, 10**6])
    groups = by_frequency(predictions(targets=np.array([0, 1, 2, 3, 4, 5, 6, 6]), nll=np.arange(8.0)), counts)
    assert [(g.name, g.count, g.loss) for g in groups] == [
        ("never", 1, 0.0),
        ("1 or more, below 10", 2, 1.5),
        ("10 or more, below 100", 2, 3.5),
        ("100 or more, below 1,000", 1, 5.0),
        ("100,000 or more", 2, 6.5),
    ]


def test_calibration_error_is_the_mean_distance():
    chance = np.random.default_rng(1)
    top = chance.uniform(0, 1, 20_000)
    right = by_confidence(predictions(top_probability=top, correct=chance.uniform(0, 1, 20_000) < top))
    assert len(right) == 10 and calibration_error(right) < 0.02
    certain = by_confidence(predictions(top_probability=np.full(100, 1.0), correct=np.arange(100) < 30))
    assert calibration_error(certain) == pytest.approx(0.7)


def test_repetition_counts_ngrams_that_came_before():
    assert repetition([[1, 2, 3, 4, 5]], 2) == 0
    assert repetition([[1, 2, 1, 2, 1, 2]], 2) == pytest.approx(3 / 5)
    assert repetition([[1, 2, 3], [1, 2, 3]], 2) == 0, "each text by itself"
    assert math.isnan(repetition([[1]], 2))


def test_predictions_have_the_loss_that_evaluation_measures():
    params = init_params(MODEL, jax.random.key(0))
    batch = Batch(*(array[0] for array in make_batch()))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = predict_targets(MODEL, params, [batch, batch], Compute(), device)
    measured = measure(jax.jit(make_eval_step(MODEL, Compute())), params, [batch], device, 1.0)
    assert len(found.nll) == 2 * (batch.targets >= 0).sum()
    assert found.nll.mean() == pytest.approx(measured.val_loss, rel=1e-5)
    assert sorted(set(found.positions.tolist())) == list(range(11))


def test_the_verb_prints_all_parts(tmp_path, capsys):
    config = run_config(tmp_path, train={"num_steps": 2, "eval_every": 2})
    assert trainer.train(config) == 0
    loss = [line for line in capsys.readouterr().out.splitlines() if "validation loss" in line][-1]
    args = ["diagnose", config.run_dir, "--windows", "8", "--batch_size", "8", "--sample_tokens", "12"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert printed.split("loss ")[1][:5] in loss, "that of the evaluation on the same windows"
    for part in ("position in the document", "occurrences", "calibration error", "Repeated 4-grams within 12 tokens"):
        assert part in printed
    assert main(["data", config.run_dir, "--step", "2"]) == 0
    assert "step=3 must be at most train.num_steps=2" in refused(capsys, "data", config.run_dir, "--step", "3")
    (Path(config.data.path[0]) / "000.txt").write_text("other words than those of training\n" * 20)
    assert "its text has changed since it was trained" in refused(capsys, "data", config.run_dir, "--step", "2")


def test_text_that_has_changed_is_read_with_the_tokenizer_of_the_run(tmp_path):
    config = untrained_run(tmp_path, tokenizer=TokenizerConfig(kind="bpe", vocab_size=280))
    tokenizer = load_tokenizer(Path(config.run_dir) / "tokenizer.json")
    learned = set()
    for _ in range(2):
        assert open_own_text(config, tokenizer, str).tokenizer.fingerprint == tokenizer.fingerprint
        learned.add(prepare(config.data, config.tokenizer, Path(config.cache_dir), report=str).tokenizer.fingerprint)
        for path in Path(config.data.path[0]).iterdir():
            path.write_text(path.read_text().replace("a", "xyz") + path.name)
    assert len(learned) == 2, "the tokenizer that is learned from the text has changed"


def test_the_documents_of_a_step_are_those_of_its_batch_while_the_batch_grows(tmp_path):
    config = untrained_run(tmp_path, train={"batch_ramp": ("0:2", "2:4", "3:8")})
    lines = step_lines(config, Path(config.run_dir), 4)
    first = 2 + 2 + 4
    assert lines[0] == f"step 4: sequences {first} to {first + 7} of the run"
    prepared = prepare(config.data, config.tokenizer, Path(config.cache_dir), report=str)
    windows = PackedWindows(prepared.dataset.train, config.model.block_size, config.seed, False)
    expected = [prepared.tokenizer.decode(windows.row(first + n).inputs) for n in range(8)]
    shown = [line for line in lines if line.startswith("sequence ")]
    assert [line.rpartition(": ")[2] for line in shown] == [repr(" ".join(text.split())) for text in expected]
