"""Every task trains, whatever the widths of its batches."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from gptjax.config.data import DataConfig
from gptjax.config.mixtures import PartConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.report.metrics import read_metrics
from gptjax.tasks.registry import make_task, read_source, with_labels
from gptjax.training import trainer
from gptjax.training.step import compute_options
from tests.tiny import replace, run_config

STEPS = 6


def write_rows(folder: Path) -> dict[str, Path]:
    """Files of 60 rows whose lengths vary, by kind of task."""
    rows = {
        "classify": [{"text": "x" * (3 + 13 * n % 28), "label": "ab"[n % 2]} for n in range(60)],
        "tag": [{"tokens": ["w" * (1 + n % 5)] * (1 + n % 7), "tags": ["AB"[n % 2]] * (1 + n % 7)} for n in range(60)],
        "instruct": [{"prompt": "q" * (1 + n % 11), "response": f"a {n}" * (1 + n % 2)} for n in range(60)],
    }
    paths = {}
    for kind, values in rows.items():
        paths[kind] = folder / f"{kind}.jsonl"
        paths[kind].write_text("".join(json.dumps(value) + "\n" for value in values))
    return paths


def task_config(tmp_path: Path, kinds: tuple[str, ...]) -> Config:
    """A run on one task, or on several as parts that are named in the order of `kinds`."""
    paths = write_rows(tmp_path)
    config = run_config(tmp_path)
    train = dataclasses.replace(config.train, num_steps=STEPS, batch_size=4, eval_every=0, eval_windows=512)
    parts = tuple(
        PartConfig(
            name=f"{'abc'[n]}-{kind}",
            task=TaskConfig(kind=kind, **({"template": "{role}{content}"} if kind == "instruct" else {})),
            data=DataConfig(path=(str(paths[kind]),), validation_fraction=0.2),
        )
        for n, kind in enumerate(kinds)
    )
    if len(kinds) == 1:
        return dataclasses.replace(config, train=train, task=parts[0].task, data=parts[0].data)
    return dataclasses.replace(config, train=train, task=TaskConfig(kind="multi"), data=DataConfig(), parts=parts)


def shapes(config: Config) -> list[set]:
    """The shapes that each leaf of the run's batches takes."""
    source = read_source(config, None)
    config = with_labels(replace(config, model={"vocab_size": source.tokenizer.vocab_size}), source.examples)
    windows = make_task(config, source, compute_options(config), jax.jit).windows
    batches = [jax.tree.leaves(windows.batch(step, config.train.batch_size)) for step in range(STEPS)]
    return [{leaf.shape for leaf in leaves} for leaves in zip(*batches, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [("classify",), ("tag",), ("instruct",), ("classify", "instruct"), ("instruct", "classify"), ("tag", "classify")],
    ids="-".join,
)
def test_a_task_whose_batches_differ_in_width_trains(tmp_path, kinds):
    config = task_config(tmp_path, kinds)
    found = shapes(config)
    if "classify" in kinds:
        assert any(len(sizes) > 1 for sizes in found), "the test needs batches of several widths"
    if kinds[0] != "classify" and "classify" in kinds:
        assert len(found[0]) == 1, "the test needs a first leaf that does not tell the widths apart"
    assert trainer.train(config) == 0
    assert [row["step"] for row in read_metrics(Path(config.run_dir)) if "loss" in row] == [*range(1, STEPS + 1)]
