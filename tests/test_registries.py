"""The names that the config allows are those of the tables that hold the functions."""

import typing

import pytest

from gptjax.batches.objectives import OBJECTIVES
from gptjax.config.log import LogConfig
from gptjax.config.model import ModelConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.plan import CHIP_NAMES
from gptjax.machine.chips import CHIPS
from gptjax.model.norms import NORMS
from gptjax.model.positions import POSITIONS
from gptjax.ops.activations import ACTIVATIONS
from gptjax.report.sinks import SINKS
from gptjax.tasks.registry import TASKS
from gptjax.text.tokenizer import MAKERS
from gptjax.training.optim import OPTIMIZERS
from gptjax.training.schedules import DECAYS


@pytest.mark.parametrize(
    ("config", "field", "table"),
    [
        (ModelConfig, "norm", NORMS),
        (ModelConfig, "activation", ACTIVATIONS),
        (ModelConfig, "positions", POSITIONS),
        (OptimConfig, "name", OPTIMIZERS),
        (OptimConfig, "schedule", DECAYS),
        (TaskConfig, "kind", {*TASKS, "multi"}),  # multi is made of the others
        (ObjectiveConfig, "kind", {*OBJECTIVES, "causal", "multi_token"}),  # these two rearrange nothing
        (TokenizerConfig, "kind", MAKERS),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_an_option_names_exactly_what_its_table_has(config, field, table):
    assert set(typing.get_args(typing.get_type_hints(config)[field])) == set(table)


def test_there_is_an_option_for_each_sink_and_each_chip():
    assert set(SINKS) <= set(typing.get_type_hints(LogConfig))
    assert set(CHIP_NAMES) == set(CHIPS)
