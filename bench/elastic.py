"""A run that goes on elsewhere: python bench/elastic.py [--from N ...] [--to N ...], layouts by their number;
`--page docs/scaling.md` writes the table there.

Trains a small model with dropout for 6 steps in one layout, then for 6 more in another one, from the checkpoint; prints
a table of the largest relative difference of its 12 losses from those of one device that was never stopped, and ends
with status 1 where one is 1e-5 or more. The devices are those of the CPU, the processes real ones (gloo).
"""

import argparse
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from equality import write_table

from gptjax.config.data import DataConfig
from gptjax.config.mesh import MeshConfig
from gptjax.config.model import ModelConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.reader import to_yaml
from gptjax.config.run import Config
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.train import TrainConfig
from gptjax.report.metrics import read_metrics

STEPS, LIMIT = 6, 1e-5


@dataclasses.dataclass(frozen=True)
class Layout:
    """Processes, devices of each, and the mesh that they form."""

    processes: int
    devices: int
    mesh: dict[str, int]

    def __str__(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "one device"
        return axes + (f", {self.processes} processes" if self.processes > 1 else "")


LAYOUTS = (
    Layout(1, 1, {"data": 1}),
    Layout(1, 2, {"data": 1, "tensor": 2}),
    Layout(1, 4, {"data": 1, "fsdp": 4}),
    Layout(1, 8, {"data": 8}),
    Layout(1, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    Layout(2, 2, {"data": 2, "fsdp": 2}),
    Layout(2, 4, {"data": 1, "fsdp": 8}),
    Layout(4, 1, {"data": 1, "fsdp": 2, "tensor": 2}),
    Layout(1, 8, {"data": 1, "tensor": 2, "context": 2, "stage": 2}),
)


def make_config(folder: Path) -> Config:
    return Config(
        cache_dir=str(folder / "cache"),
        model=ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=32, dropout=0.1, vocab_multiple=8),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(source="python-stdlib", max_documents=40),
        optim=OptimConfig(learning_rate=1e-3, schedule="constant", min_learning_rate=OptimConfig().min_learning_rate),
        train=TrainConfig(num_steps=STEPS, batch_size=16, micro_batch_size=8, compute_dtype="float32", log_every=1,
                          eval_every=0, eval_windows=8, save_every=0, sample_tokens=0, unroll=1),
    )  # fmt: skip


def train(config: Config, layout: Layout, run_dir: Path, num_steps: int) -> None:
    """Trains in processes of their own, up to a step."""
    run = dataclasses.replace(config.train, num_steps=num_steps)
    mesh = MeshConfig(**layout.mesh)
    path = run_dir.with_suffix(".yaml")
    path.write_text(to_yaml(dataclasses.replace(config, run_dir=str(run_dir), train=run, mesh=mesh)))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{found.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(layout.devices)}
    running = []
    for process in range(layout.processes):
        command = [sys.executable, "-m", "gptjax", "train", str(path), "--cluster.coordinator", coordinator]
        command += ["--cluster.num_processes", str(layout.processes), "--cluster.process_id", str(process)]
        command += ["--cluster.lost_timeout", "600"]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment))
    statuses = [process.wait() for process in running]
    if any(statuses):
        sys.exit(f"{layout}: status {statuses}")


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir) if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = range(len(LAYOUTS))
    parser.add_argument("--from", type=int, nargs="+", choices=numbers, default=list(numbers), dest="before")
    parser.add_argument("--to", type=int, nargs="+", choices=numbers, default=list(numbers), dest="after")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gptjax-elastic-") as name:
        folder = Path(name)
        config = make_config(folder)
        train(config, LAYOUTS[0], folder / "unbroken", 2 * STEPS)
        expected = losses(folder / "unbroken")
        lines = ["| saved on | " + " | ".join(f"→ {LAYOUTS[n]}" for n in options.after) + " |"]
        lines.append("|---" * (len(options.after) + 1) + "|")
        print("\n".join(lines), flush=True)
        largest = 0.0
        for before in options.before:
            saved = folder / f"{before}"
            train(config, LAYOUTS[before], saved, STEPS)
            cells = []
            for after in options.after:
                run_dir = folder / f"{before}-{after}"
                shutil.copytree(saved, run_dir)
                train(config, LAYOUTS[after], run_dir, 2 * STEPS)
                pairs = zip(losses(run_dir), expected, strict=True)
                cells.append(max(abs(ours - theirs) / theirs for ours, theirs in pairs))
            largest = max(largest, *cells)
            lines.append(f"| {LAYOUTS[before]} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")
            print(lines[-1], flush=True)
    if options.page:
        write_table(options.page, "elastic", lines)
    sys.exit(1 if largest >= LIMIT else 0)


if __name__ == "__main__":
    main()
