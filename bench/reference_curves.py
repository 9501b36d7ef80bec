"""Trains presets with three seeds each and writes their reference curves into gptjax/report/curves.

    python bench/reference_curves.py --folder runs/curves --data tinyshakespeare.txt shakespeare_cpu llama_tiny

A run that is finished is not trained again, so the command can be repeated; `--data` is left out for demo.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from gptjax.checkpoints.checkpoint import FOLDER
from gptjax.checkpoints.choice import choose
from gptjax.config.reader import load_config
from gptjax.report.metrics import read_metrics
from gptjax.report.reference import make_reference

ROOT = Path(__file__).parents[1]
CURVES = ROOT / "gptjax" / "report" / "curves"
SEEDS = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("runs/curves"))
    parser.add_argument("--data", default="")
    options = parser.parse_args()
    for preset in options.presets:
        for seed in SEEDS:
            train(preset, seed, options.folder / preset / f"seed={seed}", options.data)
        print(write_curve(preset, {seed: options.folder / preset / f"seed={seed}" for seed in SEEDS}))


def train(preset: str, seed: int, run_dir: Path, data: str) -> None:
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / f"{preset}.yaml")]
    command += ["--seed", str(seed), "--run_dir", str(run_dir), "--train.save_every", "0"]
    subprocess.run([*command, *(["--data.path", data] if data else [])], check=True)


def write_curve(preset: str, run_dirs: dict[int, Path]) -> Path:
    configs = {seed: load_config(run_dir / "config.yaml") for seed, run_dir in run_dirs.items()}
    hashes = {data_hash(run_dir) for run_dir in run_dirs.values()}
    if len(hashes) > 1:
        sys.exit(f"{preset}: the runs have different data; train them again in an empty folder")
    rows = {seed: read_metrics(run_dir) for seed, run_dir in run_dirs.items()}
    reference = make_reference(preset, next(iter(configs.values())), hashes.pop(), rows)
    path = CURVES / f"{preset}.json"
    path.write_text(json.dumps(dataclasses.asdict(reference)) + "\n", encoding="utf-8")
    return path


def data_hash(run_dir: Path) -> str:
    manifest = choose(run_dir / FOLDER, "latest", strict=False).manifest
    assert manifest is not None, f"{run_dir} has no checkpoint"
    return manifest.meta["data_hash"]


if __name__ == "__main__":
    main()
