"""Reward models and DPO: their losses by the published formulas, and whole runs."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.batches.preferences import encode_preferences
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import AdapterConfig, FinetuneConfig, TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.evaluation.preferences import ScorePredictions, score_preferences
from gptjax.model import gpt
from gptjax.model.gpt import Compute
from gptjax.report.metrics import read_metrics
from gptjax.tasks.dpo import with_reference
from gptjax.tasks.registry import make_loss, parse
from gptjax.tasks.reward import _encode
from gptjax.text.formats import Row
from gptjax.text.tokenizer import make_tokenizer
from gptjax.training import trainer
from tests.tiny import MODEL, hidden_states, init_all, replace, run_config

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), lambda: [])
END = BYTES.end_of_text
MODEL_32 = dataclasses.replace(MODEL, vocab_size=257, block_size=32)
TEMPLATE = "{role}\n{content}\n"  # short; a response begins after the newline
ROWS = [
    {"prompt": "q", "chosen": "yes", "rejected": "n"},
    {"prompt": "rs", "chosen": "ab", "rejected": "ba"},
    {"prompt": "t", "chosen": "u", "rejected": "vwx"},
]


def examples(task: TaskConfig, rows=ROWS) -> list:
    return list(parse([Row(row, f"r:{n}") for n, row in enumerate(rows, 1)], task, DataConfig()))


def states(params: dict, ids: np.ndarray) -> jax.Array:
    return hidden_states(MODEL_32, params, ids[None], np.arange(len(ids))[None])


def response_log_prob(params: dict, prompt: str, response: str) -> float:
    """The log-probability of a response and what ends it, from the logits of one unpadded sequence."""
    before = f"user\n{prompt}\nassistant\n".encode()
    ids = np.array([END, *before, *response.encode(), *b"\n", END], np.int32)
    logits = np.asarray(gpt.logits(MODEL_32, params, states(params, ids[:-1]))[0], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(log_p[t, ids[t + 1]] for t in range(len(before), len(ids) - 1))


def whole(rows):
    return rows.batch(np.arange(len(rows.tokens)), rows.tokens, np.ones(len(rows.tokens)))


def test_the_loss_of_a_reward_model_is_that_of_bradley_and_terry():
    task = TaskConfig(kind="reward", template=TEMPLATE, pooling="last")
    config = Config(model=MODEL_32, task=task)
    params = init_all(config, jax.random.key(0))
    params["heads"]["reward"]["w"] *= 50.0  # so that scores differ
    head, expected = params["heads"]["reward"], []

    def score(prompt: str, response: str) -> float:
        ids = np.array([END, *f"user\n{prompt}\nassistant\n{response}\n".encode(), END], np.int32)
        return float(np.asarray(head["w"])[0] @ np.asarray(states(params, ids)[0, -1]))

    for row in ROWS:
        margin = score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"])
        expected.append(-np.log(1 / (1 + np.exp(-margin))))
    assert max(expected) - min(expected) > 0.01
    loss = jax.jit(make_loss(config, Compute()))(params, whole(_encode(config, BYTES, examples(task))), None)
    assert float(loss.objective) == pytest.approx(sum(expected), rel=1e-4) and float(loss.count) == 3


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_is_equation_7_of_the_paper(beta):
    task = TaskConfig(kind="dpo", template=TEMPLATE, beta=beta)
    adapter = AdapterConfig(kind="lora", rank=2)
    config = Config(
        model=dataclasses.replace(MODEL_32, adapter=adapter), task=task, init_from="x",
        finetune=FinetuneConfig(train="new"), train=dataclasses.replace(Config().train, batch_size=2),
    )  # fmt: skip
    base = init_all(Config(model=MODEL_32), jax.random.key(0))
    params = init_all(Config(model=MODEL_32), jax.random.key(1))  # a policy far from the reference
    pairs = with_reference(config, base, encode_preferences(examples(task), BYTES, 32), Compute())
    expected, accuracy = 0.0, 0
    for row, reference in zip(ROWS, pairs.targets, strict=True):
        policy = np.array([response_log_prob(params, row["prompt"], row[side]) for side in ("chosen", "rejected")])
        known = np.array([response_log_prob(base, row["prompt"], row[side]) for side in ("chosen", "rejected")])
        np.testing.assert_allclose(reference, known, rtol=1e-5)
        margin = beta * ((policy[0] - known[0]) - (policy[1] - known[1]))
        expected -= math.log(1 / (1 + math.exp(-margin)))
        accuracy += margin > 0
    plain = dataclasses.replace(config, model=MODEL_32, finetune=FinetuneConfig())
    loss = jax.jit(make_loss(plain, Compute()))(params, whole(pairs), None)
    assert float(loss.objective) == pytest.approx(expected, rel=1e-4)
    assert float(loss.extras["accuracy"]) == accuracy


def test_scores_of_preferences():
    found = score_preferences(ScorePredictions(np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0]])), 0.5)
    assert found.accuracy == 0.5 and found.margin == pytest.approx(-2 / 3)


WRONG = [
    ({}, {"prompt": "a", "chosen": "b"}, "r:1: .*'rejected'.*task.rejected_field"),
    ({"chosen_field": "good"}, {"prompt": "a", "chosen": "b", "rejected": "c"}, "r:1: .*'good'.*task.chosen_field"),
    ({"rejected_field": "chosen"}, {"prompt": "a", "chosen": "b"}, "both 'chosen'; name two fields"),
    ({}, {"prompt": "", "chosen": "b", "rejected": "c"}, "r:1: field 'prompt' is an empty text"),
]


@pytest.mark.parametrize("task, row, message", WRONG)
def test_a_wrong_row_is_named(task, row, message):
    with pytest.raises(UserError, match=message):
        examples(TaskConfig(kind="dpo", **task), [row])


def test_responses_must_differ_within_the_window():
    task = TaskConfig(kind="dpo", template=TEMPLATE)
    assert examples(task, [{"prompt": "a", "chosen": "b", "rejected": "b"}]) == []
    late = examples(task, [{"prompt": "a" * 30, "chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match=r"r:1: the response begins after task.max_tokens=32"):
        encode_preferences(late, BYTES, 32)
    alike = examples(task, [{"prompt": "a", "chosen": "b" * 30 + "c", "rejected": "b" * 30 + "d"}])
    with pytest.raises(UserError, match=r"r:1: both responses are the same within task.max_tokens=32"):
        encode_preferences(alike, BYTES, 32)
    with pytest.raises(UserError, match=r"task.kind=dpo compares the model with .* init_from"):
        Config(task=task)


@pytest.mark.slow
def test_runs_learn_to_prefer_and_to_score(tmp_path, capsys):
    base = run_config(tmp_path, run_dir=str(tmp_path / "base"), train={"num_steps": 1})
    assert trainer.train(base) == 0
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(30)))
    train = {"num_steps": 6, "eval_windows": 512, "eval_every": 3, "save_every": 0, "sample_tokens": 0}
    common = replace(base, data={"path": (str(path),), "validation_fraction": 0.3}, train=train)
    common = replace(common, init_from=base.run_dir, tokenizer=TokenizerConfig(), run_dir="unused")
    lora = AdapterConfig(kind="lora", rank=2)
    dpo = replace(
        common, run_dir=str(tmp_path / "dpo"), task=TaskConfig(kind="dpo", template=TEMPLATE),
        model={"adapter": lora}, finetune=FinetuneConfig(train="new"), optim={"learning_rate": 3e-2},
    )  # fmt: skip
    assert trainer.train(dpo) == 0
    metrics = read_metrics(Path(dpo.run_dir))
    first = next(row for row in metrics if "loss" in row)
    # The policy starts as the reference; sums of log-probabilities differ by rounding between two programs.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-5)
    last = [row for row in metrics if "val_loss" in row][-1]
    assert last["val_loss"] < math.log(2) and last["accuracy"] == 1.0
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", dpo.run_dir]) == 0
    assert f"loss {last['val_loss']:.4f}" in capsys.readouterr().out
    reward = replace(
        common, run_dir=str(tmp_path / "reward"), task=TaskConfig(kind="reward", template=TEMPLATE, pooling="last")
    )
    assert trainer.train(reward) == 0
    capsys.readouterr()
    rows = [{"prompt": "1", "response": text} for text in "ab"]
    (tmp_path / "score.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["predict", "--run_dir", reward.run_dir, "--file", str(tmp_path / "score.jsonl")]) == 0
    good, bad = (json.loads(line)["predicted"] for line in capsys.readouterr().out.splitlines())
    assert good > bad
