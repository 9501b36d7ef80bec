"""Validation loss over learning rates and widths, with muP and without: how far the best rate moves.

    python bench/mup.py TEXT [--widths 128 256 512] [--rates 1e-3 2e-3 4e-3 8e-3 16e-3] [--steps 150]

Heads have 32 channels at every width. Runs that are trained already are not trained again.
"""

import argparse
import json
from pathlib import Path

from gptjax.config.reader import from_dict
from gptjax.config.run import Config
from gptjax.machine import compile_cache
from gptjax.report.metrics import read_metrics
from gptjax.training import trainer


def train(text: Path, runs: Path, width: int, rate: float, base: int, steps: int) -> float:
    """Trains a run, unless its result is stored; returns its validation loss."""
    folder = runs / f"{width}-{rate:g}-{base}-{steps}"
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))["val_loss"]
    options = {
        "run_dir": str(folder),
        "tokenizer": {"kind": "chars"},
        "data": {"path": [str(text)]},
        "model": {
            **{"n_layer": 2, "n_head": width // 32, "n_embd": width, "block_size": 64},
            "mup_base_width": base,
        },
        "optim": {"learning_rate": rate, "min_learning_rate": 0.0, "warmup_steps": 20, "beta2": 0.99},
        "train": {"num_steps": steps, "batch_size": 12, "eval_every": 0, "save_every": 0, "sample_tokens": 0},
    }
    if trainer.train(from_dict(Config, options, "bench/mup.py")):
        raise SystemExit(f"{folder} ended early")
    loss = [row["val_loss"] for row in read_metrics(folder) if "val_loss" in row][-1]
    result.write_text(json.dumps({"val_loss": loss}), encoding="utf-8")
    return loss


def main() -> None:
    """Prints a table; the best rate of each row is in bold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--runs", type=Path, default=Path("runs/mup"))
    options = parser.parse_args()
    compile_cache.start()
    rows = []
    for base in (0, min(options.widths)):
        for width in options.widths:
            losses = [train(options.text, options.runs, width, rate, base, options.steps) for rate in options.rates]
            cells = [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]
            rows.append(f"| {'muP' if base else 'without'}, width {width} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    print(f"\n| | {' | '.join(f'{rate:g}' for rate in options.rates)} |\n|{'---|' * (len(options.rates) + 1)}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
