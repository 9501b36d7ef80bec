"""A run that ends early and resumes gives the bits of an uninterrupted one, for objectives and tasks of every kind."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.data import DataConfig
from gptjax.config.mixtures import PartConfig
from gptjax.config.model import ModelConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.run import Config
from gptjax.config.task import FinetuneConfig, TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.training import trainer
from tests.tiny import replace, run_config

# ul2 is made of the others; that each batch depends on its seed and step alone, test_objectives.py tests of all.
OBJECTIVES = ("fill_in_the_middle", "multi_token", "masked", "permutation", "ul2")
ROWS = {
    "classify": lambda n: {"text": f"{'x' * (n % 5)} {n}", "label": "ab"[n % 2]},
    "regress": lambda n: {"text": f"{'y' * (n % 5)} {n}", "label": n},
    "choose": lambda n: {"text": str(n), "candidates": ["a", "bb"], "label": n % 2},
    "tag": lambda n: {"tokens": ["w" * (1 + n % 3), str(n)], "tags": ["A", "B"]},
    "answer": lambda n: {"context": f"k{n} v{n}", "question": f"k{n}?", "answers": f"v{n}"},
    "instruct": lambda n: {"prompt": str(n), "response": f"r{n}"},
    "reward": lambda n: {"prompt": str(n), "chosen": "a", "rejected": "b"},
    "dpo": lambda n: {"prompt": str(n), "chosen": "a", "rejected": "b"},
    "seq2seq": lambda n: {"source": f"s{n}", "target": f"t{n}"},
}
OPTIONS = {"multi_token": {"ahead": 2}, "masked": {"next_sentence": True}}
SHORT = {"template": "{role}{content}"}
TASKS = {
    "mixout": {"kind": "classify", "bag_of_words": 2, "layer_mixture": True},
    "answer": {"kind": "answer", "max_tokens": 24, "stride": 4},
    "reward": {"kind": "reward", **SHORT},
    "dpo": {"kind": "dpo", **SHORT},
    "seq2seq": {"kind": "seq2seq"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    """A small run to start from, of one step."""
    train = {"num_steps": 4, "save_every": 2, "eval_every": 0, "eval_windows": 2, "batch_size": 4}
    model = {"n_layer": 1, "dropout": 0.1}
    config = run_config(tmp_path_factory.mktemp("resume"), model=model, train=train)
    assert trainer.train(replace(config, train={"num_steps": 1})) == 0
    return config


def rows_of(kind: str, folder: Path) -> DataConfig:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(ROWS[kind](n)) + "\n" for n in range(40)))
    field = "context" if kind == "answer" else "text"
    return DataConfig(path=(str(path),), validation_fraction=0.2, text_field=field)


def config_of(name: str, base: Config, folder: Path) -> Config:
    """The run called `name`: an objective, a task, or `multi`."""
    if name in OBJECTIVES:
        task = TaskConfig(objective=ObjectiveConfig(kind=name, **OPTIONS.get(name, {})))
        return replace(base, run_dir=str(folder / name), task=task, model={"bidirectional": name == "masked"})
    train = dataclasses.replace(base.train, eval_windows=512)
    if name == "multi":
        parts = [
            PartConfig(name=kind, task=TaskConfig(kind=kind, **(SHORT if kind == "instruct" else {})), data=data)
            for kind in ("classify", "regress", "choose", "tag", "instruct")
            for data in [rows_of(kind, folder)]
        ]
        parts.append(PartConfig(name="text", data=base.data))
        return dataclasses.replace(
            base, run_dir=str(folder / name), task=TaskConfig(kind="multi"), parts=tuple(parts), data=DataConfig()
        )
    task = TaskConfig(**TASKS[name])
    data = rows_of(task.kind, folder)
    config = dataclasses.replace(base, run_dir=str(folder / name), train=train, data=data)
    if name == "seq2seq":
        return replace(config, task=task, model={"encoder_layers": 1})
    return dataclasses.replace(
        config,
        task=task,
        init_from=base.run_dir,
        model=ModelConfig(dropout=0.1),
        tokenizer=TokenizerConfig(),
        finetune=FinetuneConfig(mixout=0.5 if name == "mixout" else 0.0),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OBJECTIVES, *TASKS, "multi"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(base, tmp_path, name):
    config = config_of(name, base, tmp_path)
    assert trainer.train(config) == 0
    whole = load_run(Path(config.run_dir), "latest")
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / "00000004")  # as if it had been killed after step 2
    halfway = load_run(Path(config.run_dir), "latest")
    assert (halfway.step, whole.step) == (2, 4)
    assert trainer.train(config) == 0
    resumed = load_run(Path(config.run_dir), "latest")
    assert resumed.step == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(halfway.params), jax.tree.leaves(whole.params), strict=True)
    ]
    assert any(changed), "the steps after the checkpoint trained something"
