"""Finds meshes and micro-batches that should fit, by formula; `plan.py` compiles the best ones."""

import dataclasses
import math
from collections.abc import Iterator

from jax.sharding import AbstractMesh, AxisType

from gptjax.config.mesh import MeshConfig
from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.machine.chips import Chip
from gptjax.parallel.fits import check_fits
from gptjax.planning import estimate
from gptjax.planning.compiled import abstract_state, device_bytes

AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
MAX_LOCAL_BATCH = 64
"""Largest number of sequences of a micro-batch on one device; more are not faster."""


def suggestions(
    config: Config, chip: Chip, devices: int, limit: float, ratio: float, model_flops: float
) -> list[Config]:
    """Returns the config with every mesh and micro-batch that should fit, fastest first.

    If none fits, it tries again with `remat=full`.

    Args:
        config: The run; its mesh and micro-batch are ignored.
        chip: Kind of device.
        devices: Number of devices.
        limit: Bytes that a step may use on a device.
        ratio: Measured temporaries of a compiled step divided by their estimate.
        model_flops: FLOPs of a step on all devices.
    """
    found = list(_rated(config, chip, devices, limit, ratio, model_flops))
    if not found and config.train.remat != "full":
        train = dataclasses.replace(config.train, remat="full", unroll=1)
        found = list(_rated(dataclasses.replace(config, train=train), chip, devices, limit, ratio, model_flops))
    return [one for _, one in sorted(found, key=lambda rated: rated[0])]


def _rated(config, chip, devices, limit, ratio, model_flops) -> Iterator[tuple[tuple[float, ...], Config]]:
    batch_size = math.gcd(*(size for _, size in config.train.batch_sizes))
    for sizes in _meshes(devices, len(AXES)):
        mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        shards = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
        if mesh.shape["tensor"] > chip.node or batch_size % shards:
            continue
        one = _with_layout(config, sizes, shards)
        try:
            check_fits(one, mesh)  # pyright: ignore[reportArgumentType]: it reads only the sizes
            state = abstract_state(one, mesh)
        except UserError:
            continue
        parameters, optimizer = device_bytes((state.params, state.frozen)), device_bytes(state.opt_state)
        for local in range(1, min(MAX_LOCAL_BATCH, batch_size // shards) + 1):
            if batch_size % (local * shards) == 0:
                one = _with_layout(config, sizes, local * shards)
                on_mesh = estimate.Sizes(one, dict(mesh.shape))
                needs = device_bytes(state) + estimate.activations(on_mesh)
                needs += ratio * estimate.temporaries(on_mesh, parameters)
                if needs <= limit:
                    yield (*_seconds(on_mesh, chip, model_flops, parameters + optimizer), needs), one


def _seconds(sizes: estimate.Sizes, chip: Chip, model_flops: float, state: int) -> tuple[float, int]:
    """Sort key: time of a step to three digits, then the number of mesh axes in use. So of two equally fast layouts the
    simpler one comes first.
    """
    work = estimate.work(sizes, model_flops, state, estimate.activations(sizes))
    seconds = work.seconds(chip) + estimate.seconds_sent(sizes, chip)
    return float(f"{seconds:.3g}"), sum(size > 1 for size in sizes.mesh.values())


def _meshes(devices: int, axes: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `devices` as a product of `axes` sizes."""
    if axes == 1:
        yield (devices,)
        return
    for size in range(1, devices + 1):
        if devices % size == 0:
            for rest in _meshes(devices // size, axes - 1):
                yield size, *rest


def _with_layout(config: Config, sizes: tuple[int, ...], micro_batch: int) -> Config:
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**dict(zip(AXES, sizes, strict=True))),
        train=dataclasses.replace(config.train, micro_batch_size=micro_batch),
    )
