"""Meshes and micro-batches that should fit, the fastest first. By formula: `plan` compiles what it suggests."""

import dataclasses
from collections.abc import Iterator

from jax.sharding import AbstractMesh, AxisType

from gptjax.config.run import Config, MeshConfig
from gptjax.errors import UserError
from gptjax.machine.chips import Chip
from gptjax.parallel.fits import check_fits
from gptjax.planning import estimate
from gptjax.planning.compiled import abstract_state, device_bytes

AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
MOST_ROWS = 64
"""Rows of a micro-batch on one device: more would not be faster."""


def suggestions(
    config: Config, chip: Chip, devices: int, limit: float, ratio: float, model_flops: float
) -> list[Config]:
    """Returns the config with every mesh and micro-batch that should fit, the fastest first. Where none does, blocks
    are run again to go backward.

    Args:
        config: Its mesh and micro-batch do not matter.
        chip: What it is to run on.
        devices: How many of them.
        limit: Bytes that a step may take on one.
        ratio: What a compiled step's temporaries were, as a multiple of their estimate.
        model_flops: Of a step.
    """
    found = list(_rated(config, chip, devices, limit, ratio, model_flops))
    if not found and config.train.remat != "full":
        again = dataclasses.replace(config.train, remat="full", unroll=1)
        found = list(_rated(dataclasses.replace(config, train=again), chip, devices, limit, ratio, model_flops))
    return [one for _, one in sorted(found, key=lambda rated: rated[0])]


def _rated(config, chip, devices, limit, ratio, model_flops) -> Iterator[tuple[tuple[float, ...], Config]]:
    for sizes in _meshes(devices, len(AXES)):
        mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        if mesh.shape["tensor"] > chip.node or config.train.batch_size % rows:
            continue
        one = _with(config, sizes, rows)
        try:
            check_fits(one, mesh)  # pyright: ignore[reportArgumentType]: it asks for sizes alone
            state = abstract_state(one, mesh)
        except UserError:
            continue
        parameters, optimizer = device_bytes((state.params, state.frozen)), device_bytes(state.opt_state)
        for local in range(1, min(MOST_ROWS, config.train.batch_size // rows) + 1):
            if config.train.batch_size % (local * rows) == 0:
                one = _with(config, sizes, local * rows)
                cut = estimate.Sizes(one, dict(mesh.shape))
                needs = device_bytes(state) + estimate.kept(cut) + ratio * estimate.temporaries(cut, parameters)
                if needs <= limit:
                    yield (*_seconds(cut, chip, model_flops, parameters + optimizer), needs), one


def _seconds(sizes: estimate.Sizes, chip: Chip, model_flops: float, state: int) -> tuple[float, int]:
    """Of a step, to three digits; then how many axes are used, since of two that are as fast the simpler is better."""
    work = estimate.work(sizes, model_flops, state, estimate.kept(sizes))
    seconds = work.seconds(chip) + estimate.seconds_sent(sizes, chip)
    return float(f"{seconds:.3g}"), sum(size > 1 for size in sizes.mesh.values())


def _meshes(devices: int, axes: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `devices` as a product of so many sizes."""
    if axes == 1:
        yield (devices,)
        return
    for size in range(1, devices + 1):
        if devices % size == 0:
            for rest in _meshes(devices // size, axes - 1):
                yield size, *rest


def _with(config: Config, sizes: tuple[int, ...], micro_batch: int) -> Config:
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**dict(zip(AXES, sizes, strict=True))),
        train=dataclasses.replace(config.train, micro_batch_size=micro_batch),
    )
