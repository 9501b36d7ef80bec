"""Every rule that refuses an option without effect, found by building configs: a new rule is covered by itself."""

import ast
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

import gptjax.config
from gptjax.config.cluster import ClusterConfig
from gptjax.config.data import DataConfig
from gptjax.config.mixtures import PartConfig
from gptjax.config.model import ModelConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.train import TrainConfig
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.config.verbs.tokenizer import TokenizerVerbConfig
from gptjax.errors import UserError

ROOT = Path(gptjax.config.__path__[0])
MODULES = [
    importlib.import_module(module.name) for module in pkgutil.walk_packages(gptjax.config.__path__, "gptjax.config.")
]
CLASSES = [
    cls
    for module in MODULES
    for cls in vars(module).values()
    if isinstance(cls, type) and cls.__module__ == module.__name__ and cls.__name__.endswith("Config")
]
# What a config cannot do without, and texts that are not just any text.
REQUIRED = {
    "EvaluateConfig": {"run_dir": "r"},
    "PredictConfig": {"run_dir": "r", "text": ("a",)},
    "ServeConfig": {"run_dir": "r"},
    "EmbedConfig": {"run_dir": "r", "file": "f", "out": "o.npy"},
    "ImportConfig": {"to": "t"},
    "ExportConfig": {"to": "t"},
    "PlanConfig": {"devices": 1, "chip": "h100"},
    "PartConfig": {"name": "a", "task": TaskConfig(kind="tag")},
}
TEXTS = dict.fromkeys(("rows", "loss", "metric", "reward"), "m:f") | {
    "template": "{role}: {content}",
    "targets": ("mlp/w_in",),
    "name": "r50k_base",
    "coordinator": "node:1",
    "batch_ramp": ("0:8", "100:16"),
    "length_ramp": ("0:512", "100:1024"),
}
TWO_PARTS = tuple(PartConfig(name=name, task=TaskConfig(kind="tag")) for name in "ab")
# Configs that one change of one field does not reach.
MORE = [
    (Config, {"task": TaskConfig(kind="seq2seq"), "model": ModelConfig(encoder_layers=1)}),
    (Config, {"task": TaskConfig(kind="multi"), "parts": TWO_PARTS}),
    (Config, {"task": TaskConfig(kind="classify", multi_label=True)}),
    (Config, {"task": TaskConfig(kind="classify", folds=5)}),
    (Config, {"task": TaskConfig(kind="dpo"), "init_from": "b"}),
    (Config, {"task": TaskConfig(kind="reinforce", reward="m:f"), "init_from": "b"}),
    (ClusterConfig, {"coordinator": "node:1", "num_processes": 2, "process_id": 0}),
    (SampleConfig, {"temperature": 0.0}),
    (SampleConfig, {"temperature": 0.0, "num_beams": 2}),
    (SampleConfig, {"temperature": 0.0, "top_k": 4, "contrastive_alpha": 0.5}),
    (SampleConfig, {"prompt_file": "p", "out": "o"}),
    (EvaluateConfig, {"benchmark": "choices", "data": DataConfig(path=("x",))}),
    (ModelConfig, {"n_expert": 4, "bias": False, "expert_width": 8}),
    (ModelConfig, {"n_layer": 1}),
    (TaskConfig, {"kind": "classify", "second_field": "b", "both_orders": True}),
    (TrainConfig, {"eval_every": 0}),
    (TrainConfig, {"batch_ramp": ("0:8", "100:16")}),
    (OptimConfig, {"name": "schedule_free", "schedule": "constant"}),
    (Config, {"optim": OptimConfig(name="schedule_free", schedule="constant")}),
    (TokenizerVerbConfig, {"extend": 8, "to": "t", "data": DataConfig(path=("x",))}),
]


class Rule(NamedTuple):
    """A call of `no_effect` in a config in which the option has none."""

    file: str
    line: int
    cls: type
    values: dict[str, Any]
    """Of the config's fields."""
    section: str
    """Field of the config that holds the option's section; empty: the config itself."""
    name: str
    """Of the option."""
    option: str
    """Its name as users know it."""
    needs: str


def values_of(cls: type, field: str) -> list[Any]:
    """Other values of a field, valid as far as its type tells."""
    kind = typing.get_type_hints(cls)[field]
    [default] = [f.default for f in dataclasses.fields(cls) if f.name == field]
    if dataclasses.is_dataclass(kind):
        return [
            built for name in names_of(kind) for value in values_of(kind, name) if (built := build(kind, {name: value}))
        ]
    if typing.get_origin(kind) is Literal:
        return [option for option in typing.get_args(kind) if option != default]
    if field in TEXTS:
        return [TEXTS[field]]
    if typing.get_origin(kind) is tuple:
        return {str: [("x",)], float: [(0.5,)]}.get(typing.get_args(kind)[0], [])
    if default is dataclasses.MISSING:
        return []
    if kind is bool:
        return [not default]
    return {int: lambda: [default + 1], float: lambda: [default / 2 or 0.5], str: lambda: ["x"]}.get(kind, list)()


def names_of(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def build(cls: type, values: dict) -> Any:
    """A config, or None where these values are refused, or not all that it needs."""
    try:
        return cls(**REQUIRED.get(cls.__name__, {}) | values)
    except (UserError, TypeError):
        return None


@functools.cache
def rules() -> list[Rule]:
    """All calls of `no_effect` for an option without effect, of configs with one field changed."""
    found, seen = [], []

    def record(section, config, name, active, needs):
        if not active:
            frame = inspect.currentframe()
            assert frame is not None and frame.f_back is not None
            caller, option = frame.f_back, f"{section}.{name}" if section else name
            place = (
                caller.f_locals["self"],
                Path(caller.f_code.co_filename).relative_to(ROOT).as_posix(),
                caller.f_lineno,
            )
            seen.append((*place, config, name, option, needs))

    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            if hasattr(module, "no_effect"):
                patch.setattr(module, "no_effect", record)
        bases = [(cls, {name: value}) for cls in CLASSES for name in names_of(cls) for value in values_of(cls, name)]
        for cls, values in [*((cls, {}) for cls in CLASSES), *bases, *MORE]:
            seen.clear()
            config = build(cls, values)
            for asked_by, file, line, section, name, option, needs in seen if config is not None else []:
                if asked_by is config:  # not a section of it, which is built by itself too
                    holder = "".join(field for field in names_of(cls) if getattr(config, field) is section)
                    found.append(Rule(file, line, cls, values, holder, name, option, needs))
    # One config is enough for each rule and option: the first, which changes least, that no other rule refuses.
    found.sort(key=lambda rule: build(rule.cls, rule.values) is None)
    return list({(r.file, r.line, r.cls, r.name): r for r in reversed(found)}.values())


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule.cls.__name__}-{rule.option} without {rule.needs}")
def test_an_option_without_effect_is_refused(rule):
    def refuse(values, value):
        with pytest.raises(UserError) as error:
            rule.cls(**REQUIRED.get(rule.cls.__name__, {}) | values)
        assert f"{rule.option}={value!r} has no effect without " in str(error.value)

    config = build(rule.cls, rule.values)
    if config is None:  # it was refused already: the rule is asked only where the option is set
        return refuse(rule.values, getattr(rule.values[rule.section], rule.name))
    section = getattr(config, rule.section) if rule.section else config
    others = values_of(type(section), rule.name)
    assert others
    for value in others:
        if not rule.section:
            refuse(rule.values | {rule.name: value}, value)
        elif changed := build(type(section), {rule.name: value}):
            refuse(rule.values | {rule.section: changed}, value)
        else:  # a rule of the section itself comes first
            with pytest.raises(UserError, match=f"{rule.option}=.* has no effect without "):
                type(section)(**{rule.name: value})


# Rules that must not go.
KNOWN = {
    *("model.adapter.rank", "model.adapter.dropout", "model.adapter.alpha", "model.adapter.targets"),
    *("model.adapter.tokens", "task.label_field", "task.multi_label", "task.pooling", "task.class_weights"),
    *("task.augment_delete", "task.augment_swap", "task.tokens_field", "task.tags_field", "task.lookahead"),
    *("task.prompt_field", "task.response_field", "task.messages_field", "task.template", "task.labels"),
    *("task.validation_path", "task.max_tokens", "finetune.top_k", "finetune.paths", "finetune.head_learning_rate"),
    *("cluster.num_processes", "cluster.process_id", "cluster.detect", "tokenizer.name", "tokenizer.vocab_size"),
    *(f"data.{field.name}" for field in dataclasses.fields(DataConfig)),
    *("optim.wsd_decay_fraction", "optim.min_learning_rate", "optim.eps", "train.eval_windows", "train.z_loss"),
    *("train.sample_prompt", "train.label_smoothing", "top_k", "top_p", "figure", "out"),
}


def test_every_rule_is_among_those_that_were_found():
    written = {
        (path.relative_to(ROOT).as_posix(), node.lineno)
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "no_effect"
    }
    found = {(rule.file, rule.line) for rule in rules()}
    assert {rule.option for rule in rules()} >= KNOWN
    assert written == found, "add a config to MORE in which the option has no effect"
