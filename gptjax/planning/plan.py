"""The plan of a run on other machines: memory, collectives, time, and a mesh that fits."""

import collections
import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from gptjax.config.run import Config
from gptjax.config.verbs.plan import PlanConfig
from gptjax.errors import UserError
from gptjax.machine.chips import CHIPS, Chip
from gptjax.machine.platform import plan_for_accelerator
from gptjax.parallel.fits import check_fits
from gptjax.parallel.mesh import describe_layout, make_mesh
from gptjax.planning import estimate
from gptjax.planning.collectives import KINDS
from gptjax.planning.compiled import CompiledStep, Memory, compile_step
from gptjax.planning.suggest import suggestions
from gptjax.report import cost
from gptjax.training.step import init_state

USABLE = 0.9
"""Share of a chip's memory that a step may use."""
TRIES = 3
"""Largest number of suggestions that are compiled to find one that fits."""
VOCABULARIES = {"gpt2": 50257, "r50k_base": 50257, "p50k_base": 50281, "cl100k_base": 100277, "o200k_base": 200019}
"""Vocabulary sizes of tiktoken's encodings."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """Data that one device sends in a step, with one kind of collective."""

    kind: str
    count: float
    node: float
    """Bytes over links within a node."""
    network: float
    """Bytes between nodes."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a mesh; bytes, FLOPs and seconds are per device and step."""

    config: Config
    mesh: dict[str, int]
    parameter_count: int
    memory: Memory
    fits: bool
    sent: list[Sent]
    model_flops: float
    """FLOPs of all devices together."""
    work: estimate.Work
    compute_seconds: float
    """Time of computation and memory traffic, including the pipeline bubble."""
    link_seconds: float
    """Time of communication."""

    @property
    def seconds(self) -> float:
        """Time of a step without overlap of computation and communication."""
        return self.compute_seconds + self.link_seconds

    @property
    def shortest(self) -> float:
        """Time of a step with perfect overlap of computation and communication."""
        return max(self.compute_seconds, self.link_seconds)


def plan_run(config: Config, options: PlanConfig, notify: Callable[[str], None]) -> tuple[Plan, Plan | None]:
    """Plans a run with its own layout, and with the best mesh and micro-batch found (None: none fits).

    Raises:
        UserError: The run cannot be sharded over its mesh, or its vocabulary size depends on data.
    """
    config, chip = resolve(config), CHIPS[options.chip]
    given = plan_step(config, chip, notify)
    return given, _suggested(given, chip, notify)


def resolve(config: Config) -> Config:
    """Fills in the options that a run would derive from its tokenizer and machine.

    Raises:
        UserError: An option depends on data, or the run is not a pretraining run from the beginning.
    """
    if config.task.kind != "pretrain" or config.init_from:
        name = "init_from" if config.init_from else f"task.kind={config.task.kind}"
        raise UserError(f"{name}: plan supports only task.kind=pretrain without init_from; leave it out")
    if config.task.objective.rearranges:
        raise UserError(f"task.objective.kind={config.task.objective.kind}: plan supports causal and multi_token")
    kind, size = config.tokenizer.kind, config.model.vocab_size
    if not size:
        of_kind = {"tiktoken": VOCABULARIES[config.tokenizer.name], "bytes": 257}
        of_kind |= dict.fromkeys(("bpe", "wordpiece"), config.tokenizer.vocab_size)
        size = of_kind.get(kind, 0)
    if not size:
        raise UserError(f"tokenizer.kind={kind}: the vocabulary size depends on the corpus; give --model.vocab_size")
    train = config.train
    if train.compute_dtype == "auto":  # every chip in the table supports bfloat16
        train = dataclasses.replace(train, compute_dtype="bfloat16")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size), train=train)


def plan_step(config: Config, chip: Chip, notify: Callable[[str], None]) -> Plan:
    """Compiles a run's step for all devices, and estimates its cost on `chip`.

    Raises:
        UserError: The run cannot be sharded over its mesh.
    """
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    shapes = jax.eval_shape(lambda: init_state(config))
    sizes = estimate.Sizes(config, dict(mesh.shape))
    layout = f"{describe_layout(sizes.mesh)}, micro-batches of {config.train.micro_batch}"
    notify(f"compiling for {mesh.size} virtual devices: {layout}")
    with plan_for_accelerator():
        step = compile_step(config, mesh)
    tokens = config.train.batch_size * config.model.block_size
    flops = tokens * cost.flops_per_token(config.model, shapes.params)
    memory = step.memory
    work = estimate.work(sizes, flops, memory.parameters + memory.optimizer, memory.activations)
    sent = _sent(step, chip)
    return Plan(
        config=config,
        mesh=sizes.mesh,
        parameter_count=cost.parameter_count(shapes.params),
        memory=memory,
        fits=memory.total <= USABLE * chip.memory,
        sent=sent,
        model_flops=flops,
        work=work,
        compute_seconds=work.seconds(chip),
        link_seconds=sum(one.node / chip.link + one.network / chip.network for one in sent),
    )


def _sent(step: CompiledStep, chip: Chip) -> list[Sent]:
    totals = collections.defaultdict(lambda: np.zeros(3))
    for one in step.collectives:
        crosses, size = one.crosses_nodes(chip.node), one.sent * one.times
        totals[one.kind] += [one.times, 0.0 if crosses else size, size if crosses else 0.0]
    return [Sent(kind, *map(float, totals[kind])) for kind in KINDS if kind in totals]


def _suggested(given: Plan, chip: Chip, notify: Callable[[str], None]) -> Plan | None:
    """Compiles the most promising suggestions until one fits."""
    devices = int(np.prod(list(given.mesh.values())))
    sizes = estimate.Sizes(given.config, given.mesh)
    guess = estimate.temporaries(sizes, given.memory.parameters)
    ratio = max(1.0, given.memory.temporaries / guess)
    for _ in range(TRIES):
        best = next(
            iter(suggestions(given.config, chip, devices, USABLE * chip.memory, ratio, given.model_flops)), None
        )
        if best is None:
            return None
        if _same(best, given):
            return given if given.fits else None
        found = plan_step(best, chip, notify)
        if found.fits:
            return found
        needs = estimate.temporaries(estimate.Sizes(best, found.mesh), found.memory.parameters)
        ratio = max(1.1 * ratio, (found.memory.temporaries + found.memory.activations) / needs)
    return None


def _same(config: Config, plan: Plan) -> bool:
    layout = dataclasses.asdict(config.mesh) == plan.mesh
    return layout and config.train.micro_batch == plan.config.train.micro_batch and config.train == plan.config.train
