"""Formats a plan as text and as JSON-compatible values."""

import dataclasses
from typing import Any

from gptjax.batches.ramps import sum_before
from gptjax.config.train import TrainConfig
from gptjax.config.verbs.plan import PlanConfig
from gptjax.machine.chips import CHIPS, Chip
from gptjax.parallel.mesh import describe_layout
from gptjax.planning import estimate
from gptjax.planning.plan import USABLE, Plan, Sent
from gptjax.report.cost import readable_bytes, readable_count, readable_number


def _ramps(train: TrainConfig) -> list[tuple[str, str]]:
    """A line about the ramps of the run, if it has any: the plan is about steps with their last sizes."""
    ramps = {"batch_ramp": train.batch_ramp, "length_ramp": train.length_ramp}
    named = ", ".join(f"train.{name} {' '.join(ramp)}" for name, ramp in ramps.items() if ramp)
    return [("ramp", f"{named}: this plan is of the steps with the last sizes")] if named else []


def describe(given: Plan, suggested: Plan | None, options: PlanConfig) -> str:
    """Formats a plan as a few lines of text."""
    chip, memory = CHIPS[options.chip], given.memory
    model, train = given.config.model, given.config.train
    step = f"{train.batch_size:,} sequences x {model.block_size:,} tokens in {train.batch_size // train.micro_batch}"
    layout = f"{describe_layout(given.mesh)}, micro-batches of {train.micro_batch:,} sequences"
    lines = [
        ("model", f"{readable_count(given.parameter_count)} parameters, vocabulary {model.vocab_size:,}"),
        ("step", f"{step} micro-batches, {train.compute_dtype}, remat {train.remat}"),
        *_ramps(train),
        ("mesh", f"{layout} on {options.devices} x {options.chip}"),
        ("memory", f"{_of_chip(given, chip)} per device:"),
        *(("", f"{_bytes(getattr(memory, name))}  {words}") for name, words in PARTS),
        ("sent", f"{_bytes(sum(one.node + one.network for one in given.sent))}  per device and step:"),
        *(("", f"{_bytes(one.node + one.network)}  {_sent(one)}") for one in given.sent),
        ("FLOPs", f"{given.model_flops:.3e} of the model per step, {given.work.flops:.3e} executed on each device"),
        ("time", _time(given, chip)),
        ("run", _run(given, options)),
        ("assumed", _assumed(given, options.chip)),
    ]
    lines += zip(("suggested", ""), _suggestion(given, suggested, options), strict=False)
    return "\n".join(f"{name:10}  {text}" for name, text in lines)


PARTS = (
    ("parameters", "parameters"),
    ("optimizer", "optimizer state"),
    ("other", "batch, averages, counters"),
    ("activations", "activations: saved in the forward pass for the backward pass"),
    ("temporaries", "temporaries: gradients, gathered weights, buffers within a layer"),
)


def as_values(given: Plan, suggested: Plan | None, options: PlanConfig) -> dict[str, Any]:
    """Returns a plan as JSON-compatible values, in bytes, FLOPs and seconds."""
    return {
        "devices": options.devices,
        "chip": options.chip,
        "given": _values(given, CHIPS[options.chip]),
        "suggested": None if suggested is None else _values(suggested, CHIPS[options.chip]),
    }


def _values(plan: Plan, chip: Chip) -> dict[str, Any]:
    return {
        "mesh": plan.mesh,
        "micro_batch_size": plan.config.train.micro_batch,
        "remat": plan.config.train.remat,
        "parameters": plan.parameter_count,
        "memory": dataclasses.asdict(plan.memory) | {"total": plan.memory.total},
        "fits": plan.fits,
        "sent": [dataclasses.asdict(one) for one in plan.sent],
        "model_flops": plan.model_flops,
        "device_flops": plan.work.flops,
        "bubble": plan.work.bubble,
        "seconds": plan.seconds,
        "seconds_if_hidden": plan.shortest,
        "run_hours": _hours(plan, plan.seconds),
        "run_hours_if_hidden": _hours(plan, plan.shortest),
        "model_flops_share_of_peak": _share(plan, chip, plan.seconds),
    }


def _of_chip(plan: Plan, chip: Chip) -> str:
    verdict = "fits in" if plan.fits else "does NOT fit in"
    return f"{readable_bytes(plan.memory.total)}, which {verdict} {USABLE:.0%} of {readable_bytes(chip.memory)},"


def _bytes(count: float) -> str:
    return f"{readable_bytes(count):>8}"


def _sent(one: Sent) -> str:
    return f"{one.kind} x {one.count:,.0f}" + (
        f", {readable_bytes(one.network)} of it between nodes" if one.network else ""
    )


def _time(plan: Plan, chip: Chip) -> str:
    bubble = f" (pipeline bubble {plan.work.bubble:.0%})" if plan.work.bubble else ""
    return (
        f"{plan.seconds:.3g} s per step = {plan.compute_seconds:.3g} s compute{bubble} + {plan.link_seconds:.3g} s"
        f" communication; {plan.shortest:.3g} s if they overlap: MFU {_share(plan, chip, plan.seconds):.0%}"
        f" to {_share(plan, chip, plan.shortest):.0%}"
    )


def _hours(plan: Plan, seconds: float) -> float | None:
    """Hours of all training steps, smaller ones of a ramp in proportion; None: their number depends on the data."""
    train = plan.config.train
    if train.num_epochs:
        return None
    return sum_before(train.batch_sizes, train.num_steps) / train.batch_size * seconds / 3600


def _run(plan: Plan, options: PlanConfig) -> str:
    most, least = _hours(plan, plan.seconds), _hours(plan, plan.shortest)
    if most is None or least is None:
        return f"train.num_epochs={plan.config.train.num_epochs:g}: the number of steps depends on the data"
    each = [
        f"{readable_number(hours / 24)} days = {readable_number(hours * options.devices)} {options.chip}-hours"
        for hours in (most, least)
    ]
    return f"{plan.config.train.num_steps:,} steps: {each[0]}; {each[1]} if they overlap; evaluations not included"


def _share(plan: Plan, chip: Chip, seconds: float) -> float:
    devices = 1
    for size in plan.mesh.values():
        devices *= size
    return plan.model_flops / (devices * chip.peak_flops * seconds)


def _assumed(plan: Plan, name: str) -> str:
    chip = CHIPS[name]
    slow = "" if plan.config.train.compute_dtype != "float32" else "; float32 takes longer than estimated here"
    return (
        f"{name}: {chip.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16, of which matmuls reach {estimate.EFFICIENCY:.0%};"
        f" memory {chip.memory_rate / 1e12:.3g} TB/s; links {chip.link / 1e9:.3g} GB/s in a node of {chip.node},"
        f" {chip.network / 1e9:.3g} GB/s between nodes; devices numbered node after node; memory and communication as"
        f" XLA compiles the step for CPUs{slow}"
    )


def _suggestion(given: Plan, suggested: Plan | None, options: PlanConfig) -> list[str]:
    chip = CHIPS[options.chip]
    if suggested is None:
        if given.fits:
            return ["keep the given layout; nothing better was found"]
        return [f"nothing was found that fits {options.devices} x {options.chip}; give more devices or a smaller model"]
    if suggested is given or (given.fits and given.seconds <= suggested.seconds):
        return ["keep the given layout; nothing faster was found that fits"]
    config = suggested.config
    flags = [f"--mesh.{name} {size}" for name, size in suggested.mesh.items() if size != given.mesh[name]]
    flags += [f"--train.micro_batch_size {config.train.micro_batch}"]
    if config.train.remat != given.config.train.remat:
        flags += [f"--train.remat {config.train.remat}", f"--train.unroll {config.train.unroll}"]
    return [
        " ".join(flags),
        f"(also compiled: {_of_chip(suggested, chip)} {suggested.seconds:.3g} s per step,"
        f" {suggested.shortest:.3g} s with overlap)",
    ]
