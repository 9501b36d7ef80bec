"""The real step, compiled for devices that need not exist, and what the compiler says of it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from gptjax.batches.pretraining import Batch
from gptjax.config.run import Config
from gptjax.parallel.mesh import batch_sharding
from gptjax.parallel.rules import shardings
from gptjax.planning import hlo
from gptjax.planning.collectives import Collective, collectives
from gptjax.planning.kept import kept_bytes
from gptjax.training.step import init_state, jit_train_step

# Machine code is never run, so it need not be fast; what is fused and when memory is free does not depend on it.
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device during a step."""

    parameters: int
    optimizer: int
    other: int
    """The batch, an average of the parameters, counters."""
    activations: int
    """Kept of the forward pass for the backward pass."""
    temporaries: int
    """All else that the compiler reserves: gradients, gathered weights, what a layer works with."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer + self.other + self.activations + self.temporaries


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What was compiled, with its cost on one device."""

    memory: Memory
    collectives: list[Collective]


def compile_step(config: Config, mesh: jax.sharding.Mesh) -> CompiledStep:
    """Compiles a training step; no array of it ever exists."""
    lowered, state, batch = lower_step(config, mesh)
    program = lowered.compile(QUICK)
    text = hlo.parse(program.as_text() or "")
    memory: Any = program.memory_analysis()
    parameters, optimizer = device_bytes((state.params, state.frozen)), device_bytes(state.opt_state)
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    activations = min(kept_bytes(text) + _kept_by_stages(config, mesh), temporary)
    other = device_bytes((state, batch)) - parameters - optimizer
    return CompiledStep(
        Memory(parameters, optimizer, other, activations, temporary - activations), collectives(text, mesh.size)
    )


def lower_step(config: Config, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Lowered, Any, Batch]:
    """Returns the step before it is compiled, and its arguments as shapes with their shardings."""
    state = abstract_state(config, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    options, rows = config.train, config.train.micro_batch
    shape = (options.batch_size // rows, rows, config.model.block_size)
    x_MBT = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh, leading_axes=1))
    batch = Batch(x_MBT, x_MBT, None if config.data.attend_across_documents else x_MBT, x_MBT)
    return jit_train_step(config, mesh, where).lower(state, batch), state, batch


def abstract_state(config: Config, mesh: Any) -> Any:
    """Shapes and shardings of the train state on a mesh, which may be abstract.

    Raises:
        UserError: An axis does not divide what it cuts.
    """
    shapes = jax.eval_shape(lambda: init_state(config))
    where = shardings(mesh, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)


def device_bytes(tree: Any) -> int:
    """Bytes on one device of shapes with shardings, or of arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)


def _kept_by_stages(config: Config, mesh: jax.sharding.Mesh) -> int:
    """What a stage read in the last 2S - 1 ticks (`parallel/pipeline.py`), float32."""
    size = mesh.shape
    if size["stage"] == 1:
        return 0
    tokens = config.train.micro_batch * config.model.block_size // (size["data"] * size["fsdp"] * size["context"])
    return (2 * size["stage"] - 1) * tokens * config.model.n_embd * 4
