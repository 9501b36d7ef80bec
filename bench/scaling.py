"""Tokens/s, memory and traffic of a training step on 1, 2, 4 and 8 devices along each axis of the mesh.

    python bench/scaling.py                             # prints the tables
    python bench/scaling.py --page docs/scaling.md      # writes them there, and draws docs/figures/scaling.png

*Strong*: the work stays as it is. *Weak*: what an axis cuts grows with the devices: rows (data, fsdp), positions
(context), heads and width (tensor), layers (stage). Devices are virtual: all are this machine's CPU, which has as much
to do as one device, so tokens/s show what cutting costs and not what it gains.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from equality import device_bytes, write_table

from gptjax.batches.pretraining import Batch
from gptjax.config.mesh import MeshConfig
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.train import TrainConfig
from gptjax.parallel.mesh import batch_sharding, make_mesh
from gptjax.parallel.rules import shardings
from gptjax.planning import hlo
from gptjax.planning.collectives import collectives
from gptjax.training.step import init_state, jit_train_step

DEVICES, STEPS = (1, 2, 4, 8), 2
AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
HEAD_DIM, LAYERS, HEADS, LENGTH, ROWS, STAGE_ROWS = 16, 8, 8, 128, 8, 1
FIGURE = Path(__file__).parents[1] / "docs/figures/scaling.png"


@dataclasses.dataclass(frozen=True)
class Row:
    """One step on one mesh; bytes are those of one device."""

    axis: str
    weak: bool
    devices: int
    tokens_per_s: float
    state: int
    """Parameters and moments."""
    step: int
    """All that the step holds at once."""
    traffic: int
    """Sent in one step, on a ring."""

    def line(self) -> str:
        """The row of the table."""
        sizes = " | ".join(f"{size / 1e6:,.1f}" for size in (self.state, self.step, self.traffic))
        return f"| {self.axis} | {self.devices} | {sizes} | {self.tokens_per_s:,.0f} |"


def make_config(axis: str, devices: int, weak: bool) -> Config:
    """The work of a row; all axes have the same on one device, but that stages need several micro-batches."""
    grown = devices if weak else 1
    heads = HEADS * grown // max(DEVICES) if weak and axis == "tensor" else HEADS
    layers = LAYERS * grown // max(DEVICES) if weak and axis == "stage" else LAYERS
    rows = ROWS * (grown if axis in ("data", "fsdp") else 1)
    length = LENGTH * (grown if axis == "context" else 1)
    model = ModelConfig(n_layer=layers, n_head=heads, n_embd=heads * HEAD_DIM, block_size=length, vocab_size=1024)
    train = TrainConfig(
        batch_size=rows,
        micro_batch_size=STAGE_ROWS if axis == "stage" else 0,
        compute_dtype="float32",
        remat="full",
        unroll=1,
    )
    return Config(model=model, train=train)


def measure(axis: str, devices: int, weak: bool) -> Row:
    """Compiles and runs a few steps."""
    config = make_config(axis, devices, weak)
    mesh = make_mesh(MeshConfig(**{"data": 1, axis: devices}), jax.devices()[:devices])
    where = shardings(mesh, jax.eval_shape(lambda: init_state(config)))
    state = jax.jit(lambda: init_state(config), out_shardings=where)()
    batch = jax.device_put(make_batch(config), batch_sharding(mesh, leading_axes=1))
    program = jit_train_step(config, mesh, where).lower(state, batch).compile()
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    sent = sum(one.sent * one.times for one in collectives(hlo.parse(program.as_text() or ""), devices))
    size, times = device_bytes((state.params, state.opt_state)), []
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        state, metrics = program(state, batch)
        metrics["loss"].block_until_ready()
        times.append(time.perf_counter() - started)
    speed = batch.inputs.size / statistics.median(times[1:])
    return Row(axis, weak, devices, speed, size, held, round(sent))


def make_batch(config: Config) -> Batch:
    """Random tokens `[M, B, T]`, one document a row."""
    T, rows = config.model.block_size, config.train.batch_size
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, T + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T))
    shape = (-1, config.train.micro_batch, T)
    return Batch(tokens[:, :-1].reshape(shape), tokens[:, 1:].reshape(shape), None, positions.reshape(shape))


def draw(rows: list[Row]) -> None:
    """Memory, traffic and tokens/s over devices, strong above weak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(15, 7), sharex=True)
    for weak, line in zip((False, True), panels, strict=True):
        kind = "weak" if weak else "strong"
        for axis in AXES:
            mine = [row for row in rows if row.axis == axis and row.weak == weak]
            devices = [row.devices for row in mine]
            for panel, values in zip(
                line,
                (
                    [row.state / 1e6 for row in mine],
                    [row.step / 1e6 for row in mine],
                    [row.traffic / 1e6 for row in mine],
                    [row.tokens_per_s for row in mine],
                ),
                strict=True,
            ):
                panel.plot(devices, values, marker="o", label=axis)
        titles = ("parameters and moments, MB a device", "the whole step, MB a device", "sent in a step, MB a device")
        for panel, title in zip(line, (*titles, "tokens/s, all devices on one CPU"), strict=True):
            panel.set_title(f"{kind}: {title}", fontsize=10)
            panel.set_xscale("log", base=2)
            panel.set_xticks(DEVICES, [str(n) for n in DEVICES])
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
        line[0].legend(fontsize=8)
    for panel in panels[1]:
        panel.set_xlabel("devices")
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="*", default=AXES, help="of the mesh")
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced; draws the figure too")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    rows = []
    for weak in (False, True):
        lines = ["| axis | devices | state, MB | step, MB | sent, MB | tokens/s |", "|---" + "|---:" * 5 + "|"]
        print("\n".join(lines), flush=True)
        for axis in arguments.axes:
            for devices in DEVICES:
                rows.append(measure(axis, devices, weak))
                lines.append(rows[-1].line())
                print(lines[-1], flush=True)
        if arguments.page:
            write_table(arguments.page, f"{'weak' if weak else 'strong'} scaling", lines)
    if arguments.page:
        draw(rows)


if __name__ == "__main__":
    main()
