"""Estimates the cost of a step by formulas, to choose the layouts that are compiled and to convert bytes to seconds."""

import dataclasses

import numpy as np

from gptjax.config.run import Config
from gptjax.machine.chips import Chip
from gptjax.parallel.pipeline import bubble

EFFICIENCY = 0.6
"""Assumed share of a chip's peak that matmuls reach."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Computation and memory traffic of one device in a step."""

    flops: float
    """FLOPs of the model, and of the recomputation in the backward pass."""
    memory: float
    """Bytes read and written."""
    bubble: float
    """Share of the step in which a pipeline stage idles."""

    def seconds(self, chip: Chip) -> float:
        """Time without communication."""
        return max(self.flops / (EFFICIENCY * chip.peak_flops), self.memory / chip.memory_rate) / (1 - self.bubble)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a run on a mesh, for one device."""

    config: Config
    mesh: dict[str, int]

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a step."""
        return self.config.train.batch_size // self.config.train.micro_batch

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch."""
        shared = self.mesh["data"] * self.mesh["fsdp"] * self.mesh["expert"] * self.mesh["context"]
        return self.config.train.micro_batch * self.config.model.block_size / shared

    @property
    def layers(self) -> int:
        """Number of blocks on a device."""
        return self.config.model.n_layer // self.mesh["stage"]

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 4 if self.config.train.compute_dtype == "float32" else 2

    @property
    def recomputations(self) -> int:
        """How many times the backward pass recomputes the blocks."""
        return (self.config.train.remat == "full") + (self.mesh["stage"] > 1)

    @property
    def block(self) -> float:
        """Weights of a block, gathered over fsdp."""
        model = self.config.model
        attention = (2 * model.n_head + 2 * model.kv_heads) * model.head_width
        return model.n_embd * (attention + (3 if model.gated else 2) * model.mlp_size) / self.mesh["tensor"]

    @property
    def table(self) -> float:
        """Weights of the vocabulary, gathered over fsdp and stage."""
        return self.config.model.padded_vocab_size * self.config.model.n_embd / self.mesh["tensor"]


def work(sizes: Sizes, model_flops: float, state: int, activations: float) -> Work:
    """Estimates the work of one device from the model's FLOPs of a step and the bytes of state and activations.

    A step reads and writes the state once. Each micro-batch reads the weights in every pass, and writes and reads the
    activations.
    """
    devices = int(np.prod(list(sizes.mesh.values())))
    weights = (sizes.layers * sizes.block + sizes.table) * sizes.width * (3 + sizes.recomputations)
    return Work(
        flops=model_flops * (3 + sizes.recomputations) / 3 / devices,
        memory=2 * state + sizes.micro_batches * (weights + 2 * activations),
        bubble=bubble(sizes.mesh["stage"], sizes.micro_batches),
    )


def activations(sizes: Sizes) -> float:
    """Bytes of activations: the residual stream in float32, and the inputs of every matmul unless `remat=full`."""
    D, tensor = sizes.config.model.n_embd, sizes.mesh["tensor"]
    of_layer = 4 * D
    if sizes.config.train.remat != "full":
        attention = sizes.config.model.n_head + 2 * sizes.config.model.kv_heads
        of_layer += 4 * D + 2 * sizes.width * D
        of_layer += sizes.width * (9 * D + attention * sizes.config.model.head_width) / tensor
    waiting = 4 * D * (2 * sizes.mesh["stage"] - 1) if sizes.mesh["stage"] > 1 else 0
    return sizes.tokens * (of_layer * sizes.layers + waiting)


def temporaries(sizes: Sizes, parameters: int) -> float:
    """Bytes of gradients, of one block's gathered weights and their gradients, of the table, and of work buffers."""
    D, F = sizes.config.model.n_embd, 4 * sizes.config.model.n_embd
    gradients = parameters * (2 if sizes.micro_batches > 1 else 1)
    return gradients + 8 * sizes.block + 12 * sizes.table + sizes.tokens * (40 * D + 16 * F / sizes.mesh["tensor"])


def sent(sizes: Sizes) -> dict[str, float]:
    """Bytes that a device sends along each axis of the mesh."""
    model, mesh, D = sizes.config.model, sizes.mesh, sizes.config.model.n_embd
    ticks = sizes.micro_batches + 2 * (mesh["stage"] - 1)
    blocks, passes = sizes.layers * sizes.block, 2 + sizes.recomputations
    stream = 4 * sizes.tokens * D
    ring = {axis: (size - 1) / size for axis, size in mesh.items()}
    keys = 2 * sizes.tokens * model.kv_heads * model.head_width / mesh["tensor"] * sizes.width
    return {
        "data": ticks * 2 * ring["data"] * 4 * blocks / mesh["fsdp"],
        "fsdp": ticks * ring["fsdp"] * (passes * sizes.width + 4) * blocks,
        "expert": ticks * ring["expert"] * (2 * 4 * blocks / mesh["fsdp"] + 2 * sizes.layers * passes * stream),
        "tensor": ticks * sizes.layers * 4 * ring["tensor"] * passes * stream,
        "context": ticks * sizes.layers * (mesh["context"] - 1) * (3 + sizes.recomputations) * keys,
        "stage": ticks * 2 * stream if mesh["stage"] > 1 else 0.0,
    }


def seconds_sent(sizes: Sizes, chip: Chip) -> float:
    """Time that `sent` takes if devices are numbered along the mesh, last axis fastest, node after node."""
    total, stride = 0.0, 1
    by_axis = sent(sizes)
    for axis in reversed(list(sizes.mesh)):
        stride *= sizes.mesh[axis]
        total += by_axis[axis] / (chip.link if chip.node % stride == 0 else chip.network)
    return total
