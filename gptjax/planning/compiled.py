"""Compiles the real training step for devices that need not exist, and reads memory and collectives from the result."""

import dataclasses
from typing import Any

import jax
import numpy as np

from gptjax.batches.pretraining import Batch
from gptjax.config.run import Config
from gptjax.parallel.mesh import batch_sharding, batch_shards
from gptjax.parallel.rules import shardings
from gptjax.planning import hlo
from gptjax.planning.activations import activation_bytes
from gptjax.planning.collectives import Collective, collectives
from gptjax.training.step import init_state, jit_train_step

# The machine code never runs, so it need not be fast. Fusion and buffer assignment do not depend on this level.
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device during a step."""

    parameters: int
    optimizer: int
    other: int
    """The batch, an average of the parameters, counters."""
    activations: int
    """Saved in the forward pass for the backward pass."""
    temporaries: int
    """All other memory that the compiler reserves: gradients, gathered weights, buffers within a layer."""

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return self.parameters + self.optimizer + self.other + self.activations + self.temporaries


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """Cost of a compiled step on one device."""

    memory: Memory
    collectives: list[Collective]


def compile_step(config: Config, mesh: jax.sharding.Mesh) -> CompiledStep:
    """Compiles a training step without allocating any of its arrays."""
    lowered, state, batch = lower_step(config, mesh)
    program = lowered.compile(QUICK)
    text = hlo.parse(program.as_text() or "")
    memory: Any = program.memory_analysis()
    parameters, optimizer = device_bytes((state.params, state.frozen)), device_bytes(state.opt_state)
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    activations = min(activation_bytes(text) + _stage_input_bytes(config, mesh), temporary)
    other = device_bytes((state, batch)) - parameters - optimizer
    return CompiledStep(
        Memory(parameters, optimizer, other, activations, temporary - activations), collectives(text, mesh.size)
    )


def lower_step(config: Config, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Lowered, Any, Batch]:
    """Returns the lowered step, and its arguments as shapes with shardings."""
    state = abstract_state(config, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    options, B = config.train, config.train.micro_batch
    shape = (options.batch_size // B, B, config.model.block_size)
    x_MBT = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh, leading_axes=1))
    batch = Batch(x_MBT, x_MBT, None if config.data.attend_across_documents else x_MBT, x_MBT)
    return jit_train_step(config, mesh, where).lower(state, batch), state, batch


def abstract_state(config: Config, mesh: Any) -> Any:
    """Shapes and shardings of the train state on a mesh, which may be abstract.

    Raises:
        UserError: An axis does not divide the dimension that it shards.
    """
    shapes = jax.eval_shape(lambda: init_state(config))
    where = shardings(mesh, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)


def device_bytes(tree: Any) -> int:
    """Bytes that arrays, or shapes with shardings, take on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def _stage_input_bytes(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Bytes of a stage's float32 inputs of the last 2S - 1 ticks (`parallel/pipeline.py`)."""
    size = mesh.shape
    if size["stage"] == 1:
        return 0
    tokens = config.train.micro_batch * config.model.block_size // (batch_shards(mesh) * size["context"])
    return (2 * size["stage"] - 1) * tokens * config.model.n_embd * 4
