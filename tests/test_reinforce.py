"""Reinforcement: advantages, loss and batches by their definitions, and a run that learns what is rewarded."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.rollouts import RolloutBatch, group_advantages, pack_rollouts
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.report.metrics import read_metrics
from gptjax.tasks.registry import parse
from gptjax.tasks.reinforce import encode_prompts, rewards_of, rollout_loss
from gptjax.text.formats import Row
from gptjax.text.tokenizer import make_tokenizer
from gptjax.training import trainer
from tests.tiny import MODEL, replace, run_config

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), lambda: [])
CODE = '''
def letters(row, response):
    """The share of the response that is in the row's wanted letters; the rest is worth nothing."""
    return sum(c in row["wanted"] for c in response) / 4

def length(row, response):
    return len(response)

def nothing(row, response):
    return None
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / f"reward_{tmp_path.name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def task_of(folder: Path, function: str, **more) -> TaskConfig:
    more = {"template": "{role}{content}", "response_tokens": 4, "group_size": 4} | more
    return TaskConfig(kind="reinforce", reward=f"reward_{folder.name}:{function}", **more)


def test_advantages_compare_the_responses_to_one_prompt():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0, 0.0, 0.0, 0.0, 4.0])
    found = group_advantages(rewards, 4)
    np.testing.assert_allclose(found[:4], [1, -1, -1, 1])
    np.testing.assert_array_equal(found[4:8], 0)
    np.testing.assert_allclose(found[8:], (rewards[8:] - 1) / np.sqrt(3), rtol=1e-6)


def test_targets_are_the_response_alone():
    batch = pack_rollouts([np.array([9, 1]), np.array([9])], [np.array([5, 6]), np.array([7])], np.array([1.0, 0.0]), 5)
    np.testing.assert_array_equal(batch.inputs[:, :3], [[9, 1, 5], [9, 0, 0]])
    np.testing.assert_array_equal(batch.targets, [[-1, 5, 6, -1, -1], [7, -1, -1, -1, -1]])


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_gradient_is_that_of_policy_gradient_and_kl(kl_weight):
    random = np.random.default_rng(0)
    targets = np.array([[-1, 3, 4, -1], [2, -1, -1, -1]])
    log_p, reference = (np.where(targets >= 0, random.normal(-2, 0.5, targets.shape), 0.0) for _ in range(2))
    batch = RolloutBatch(targets, jnp.asarray(targets), jnp.array([1.5, -0.5]), jnp.array([1.0, 0.0]), reference)
    value, gradient = jax.value_and_grad(lambda x: rollout_loss(kl_weight, x, batch).objective)(jnp.asarray(log_p))
    ratio = np.exp(reference - log_p)
    kl = np.where(targets >= 0, ratio - np.log(ratio) - 1, 0)
    each = np.array([2, 1])[:, None]
    expected = np.where(targets >= 0, (-np.array([[1.5], [-0.5]]) + kl_weight * (1 - ratio)) / each, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert float(value) == pytest.approx(-1.5 + 0.5 + kl_weight * (kl / each).sum(), rel=1e-4)


def test_wrong_input_is_named(folder):
    task = task_of(folder, "nothing", response_tokens=4, group_size=4)
    [long, short] = parse([Row({"prompt": "x" * 30}, "r:1"), Row({"prompt": "x"}, "r:2")], task_of(folder, "nothing"),
                          DataConfig())  # fmt: skip
    config = Config(
        model=dataclasses.replace(MODEL, block_size=32), task=task, init_from="b",
        train=dataclasses.replace(Config().train, batch_size=8),
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"r:1: the prompt has \d+ tokens, which with task.response_tokens=4 is more th"
    ):
        encode_prompts(config, BYTES, [long])
    with pytest.raises(UserError, match=r"r:2: task.reward='.*' returned None; must be a finite number"):
        rewards_of(config.task, [short], [np.array([65])], BYTES)
    with pytest.raises(UserError, match=r"train.batch_size=6 must be a multiple of task.group_size=4"):
        replace(config, train={"batch_size": 6})
    with pytest.raises(UserError, match=r"task.reward is missing"):
        TaskConfig(kind="reinforce", reward="")
    found = rewards_of(task_of(folder, "length"), [short] * 2, [np.array([65, BYTES.end_of_text]), np.array([65] * 3)],
                       BYTES)  # fmt: skip
    assert found.tolist() == [1.0, 3.0], "the end of the text is no part of the response"


@pytest.mark.slow
def test_a_run_learns_what_is_rewarded_and_resumes(folder, capsys):
    base = run_config(folder, run_dir=str(folder / "base"), train={"num_steps": 1})
    assert trainer.train(base) == 0
    rows = [{"prompt": "abc"[n % 3] * (1 + n % 2), "wanted": "aeiou "} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"num_steps": 12, "batch_size": 16, "eval_windows": 512, "eval_every": 0, "save_every": 6}
    config = replace(
        base, run_dir=str(folder / "rl"), init_from=base.run_dir, tokenizer=TokenizerConfig(), train=train,
        task=task_of(folder, "letters", kl_weight=0.001), data={"path": ("rows.jsonl",), "validation_fraction": 0.3},
        optim={"learning_rate": 3e-2, "min_learning_rate": 3e-2},
    )  # fmt: skip
    assert trainer.train(config) == 0
    metrics = [row for row in read_metrics(Path(config.run_dir)) if "loss" in row]
    rewards = [row["reward"] for row in metrics]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 0
    assert all(math.isfinite(row["grad_norm"]) and row["response_tokens"] <= 4 for row in metrics)
    broken = replace(config, run_dir=str(folder / "broken"), train={"num_steps": 6})
    assert trainer.train(broken) == 0 and trainer.train(replace(broken, train=train)) == 0
    again = [row for row in read_metrics(Path(broken.run_dir)) if "loss" in row]
    assert [(row["loss"], row["reward"]) for row in again] == [(row["loss"], row["reward"]) for row in metrics]
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", config.run_dir]) == 0
    assert "reward " in capsys.readouterr().out
