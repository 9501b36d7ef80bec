"""One run on one device and the same run on eight, cut every way: losses, gradients, memory, collectives.

    python bench/equality.py                            # prints the table
    python bench/equality.py --page docs/scaling.md     # and writes it there
    python bench/equality.py --json data=8 fsdp=2,tensor=2,context=2     # one JSON object a line, as the tests read it

Devices are virtual: all are this machine's CPU.
"""

import argparse
import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.batches.pretraining import Batch
from gptjax.config.mesh import MeshConfig
from gptjax.config.model import ModelConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.run import Config
from gptjax.config.train import TrainConfig
from gptjax.parallel.mesh import batch_sharding, make_mesh, traced_in
from gptjax.parallel.rules import shardings
from gptjax.planning import hlo
from gptjax.planning.collectives import KINDS
from gptjax.training.step import TrainState, init_state, make_train_step

DEVICES, STEPS = 8, 20
MESHES = (
    *("data=8", "fsdp=8", "tensor=4", "context=4", "stage=4"),
    *("data=2,fsdp=4", "fsdp=4,tensor=2", "data=2,tensor=2,context=2", "fsdp=2,context=4", "data=4,stage=2"),
    *("fsdp=2,tensor=2,stage=2", "context=2,stage=4", "tensor=2,context=2,stage=2", "fsdp=2,context=2,stage=2"),
)
# Dropout, accumulation, grouped heads, documents in a row; 61 tokens, which no axis divides.
CONFIG = Config(
    model=ModelConfig(vocab_size=61, block_size=32, n_layer=4, n_head=8, n_kv_head=4, n_embd=32, dropout=0.1),
    optim=OptimConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=2),
    train=TrainConfig(num_steps=STEPS, batch_size=32, micro_batch_size=8, compute_dtype="float32", unroll=1),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was seen on one mesh; differences are from one device."""

    mesh: str
    loss_difference: float
    """The largest over the steps, in nats."""
    gradient_difference: float
    """Of the first step: norm of the difference over norm, of the worst parameter."""
    param_bytes: int
    """Parameters on one device."""
    moment_bytes: int
    """Optimizer state on one device."""
    collectives: dict[str, int]
    """How many of each kind the compiled step has."""
    largest_gather: int
    """Elements of the largest array that is gathered."""
    losses: list[float]

    def line(self) -> str:
        """The row of the table."""
        counts = " | ".join(str(self.collectives.get(kind, 0)) for kind in KINDS)
        return (
            f"| {self.mesh.replace(',', ', ')} | {self.loss_difference:.1e} | {self.gradient_difference:.1e}"
            f" | {self.param_bytes:,} | {self.moment_bytes:,} | {counts} |"
        )


def batch(step: int, config: Config = CONFIG) -> Batch:
    """Random tokens `[M, B, T]`, four batches in turn, three documents a row, targets masked unevenly."""
    T, rows = config.model.block_size, config.train.batch_size
    rng = np.random.default_rng(step % 4)
    tokens = rng.integers(0, config.model.vocab_size, (rows, T + 1), dtype=np.int32)
    targets = np.where(rng.random((rows, T)) < 0.1, -1, tokens[:, 1:]).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, (rows, T), dtype=np.int32), axis=1)
    starts = np.stack([np.searchsorted(row, row) for row in segments])
    arrays = (tokens[:, :-1], targets, segments, (np.arange(T) - starts).astype(np.int32))
    return Batch(*(x.reshape(-1, config.train.micro_batch, T) for x in arrays))


def run(config: Config, mesh_config: MeshConfig, steps: int) -> tuple[list[float], TrainState, TrainState, Any]:
    """Trains; returns the losses, the states after the first and the last step, and the compiled step."""
    mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.size])
    state = init_state(config)
    where = shardings(mesh, state)
    state = jax.device_put(state, where)
    cut = batch_sharding(mesh, leading_axes=1)
    step = jax.jit(traced_in(mesh, make_train_step(config)), out_shardings=(where, None))
    program = step.lower(state, jax.device_put(batch(0, config), cut)).compile()
    losses, first = [], None
    for number in range(steps):
        state, metrics = program(state, jax.device_put(batch(number, config), cut))
        losses.append(float(metrics["loss"]))
        first = first or state
    assert first is not None
    return losses, first, state, program


def gradients(state: TrainState) -> dict[str, np.ndarray]:
    """What Adam's first moments are after one step: the gradient times a constant."""
    [moments] = [part.mu for part in state.opt_state if hasattr(part, "mu")]
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(moments))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def device_bytes(tree: Any) -> int:
    """Bytes on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def collectives(program: Any) -> list[tuple[str, int]]:
    """Each collective of a compiled program: its kind and the elements of its largest result."""
    computations = hlo.parse(program.as_text()).computations.values()
    found = [one for computation in computations for one in computation.instructions.values() if one.op in KINDS]
    return [(one.op, max(elements for _, elements in one.arrays)) for one in found]


def compare(name: str, config: Config = CONFIG, steps: int = STEPS, reference=None) -> Row:
    """Runs on a mesh given as `axis=size,...` and holds the result to that of one device."""
    losses, first, last, program = run(config, parse(name), steps)
    expected_losses, expected = reference or (losses, gradients(first))
    actual = gradients(first)
    norms = {name: np.linalg.norm(gradient) for name, gradient in expected.items()}
    differences = [np.linalg.norm(actual[n] - g) / (norms[n] or 1.0) for n, g in expected.items()]
    found = collectives(program)
    return Row(
        mesh=name or "one device",
        loss_difference=float(np.max(np.abs(np.subtract(losses, expected_losses)))),
        gradient_difference=float(max(differences)),
        param_bytes=device_bytes(last.params),
        moment_bytes=device_bytes(last.opt_state),
        collectives=dict(collections.Counter(kind for kind, _ in found)),
        largest_gather=max((size for kind, size in found if kind == "all-gather"), default=0),
        losses=losses,
    )


def parse(name: str) -> MeshConfig:
    """`axis=size,...` as a config; axes that are not named are 1."""
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in name.split(",") if part)}
    return MeshConfig(**({"data": 1} | sizes))


def write_table(page: Path, name: str, lines: Sequence[str]) -> None:
    """Puts a table into a page, between the comments that name it."""
    begin, end = (f"<!-- {name}: {word}, written by bench -->" for word in ("begin", "end"))
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n{chr(10).join(lines)}\n{end}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", nargs="*", default=MESHES, help="axis=size,axis=size")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    losses, first, _, _ = run(CONFIG, parse(""), STEPS)
    reference = losses, gradients(first)
    rows = (compare(name, reference=reference) for name in ("", *arguments.meshes))
    if arguments.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        return
    lines = ["| mesh | loss | gradient | parameters | moments | " + " | ".join(KINDS) + " |"]
    lines.append("|---" + "|---:" * (4 + len(KINDS)) + "|")
    print("\n".join(lines))
    for row in rows:
        lines.append(row.line())
        print(lines[-1], flush=True)
    if arguments.page:
        write_table(arguments.page, "equality", lines)


if __name__ == "__main__":
    main()
