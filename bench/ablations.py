"""make ablations: from the GPT-2 recipe to the modern one, part by part, on tiny Shakespeare.

    python bench/ablations.py TEXT [--steps 300] [--seeds 0 1 2] [--runs runs/ablations] [--only PART ...]

Each part is added to those before it. All runs see the same number of tokens, and as many parameters except where the
output projection is untied. Prints a table with mean and spread (largest minus smallest) of the validation loss over
the seeds. Runs that are trained already are not trained again, so an interrupted table can be continued.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from gptjax.config.reader import from_dict
from gptjax.config.run import Config
from gptjax.machine import compile_cache
from gptjax.report.metrics import read_metrics
from gptjax.training import trainer

BASE = {
    "tokenizer": {"kind": "chars"},
    "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64},
    "optim": {"learning_rate": 4e-3, "min_learning_rate": 4e-4, "warmup_steps": 30, "beta2": 0.99},
    "train": {"batch_size": 12, "eval_every": 0, "save_every": 0, "sample_tokens": 0},
}
"""GPT-2's block and AdamW, at the best of the rates 1e-3, 4e-3 and 1e-2."""
PARTS: dict[str, dict[str, dict]] = {
    "GPT-2 block, AdamW, cosine": {},
    "RMSNorm without scale, no biases": {
        "model": {"norm": "rms", "norm_scale": False, "norm_epsilon": 1e-6, "bias": False}
    },
    "RoPE": {"model": {"positions": "rope", "rope_base": 1024.0}},
    "QK-norm": {"model": {"qk_norm": "head"}},
    "squared ReLU": {"model": {"activation": "relu2"}},
    "untied output, uniform and zero init": {"model": {"tied_embeddings": False, "init": "uniform"}},
    "norm of embeddings, residual mix": {"model": {"embedding_norm": True, "residual_mix": True}},
    "logits capped at 15": {"model": {"logit_softcap": 15.0}},
    "linear decay to zero, no warm-up, decay or clipping": {
        "optim": {
            **{"schedule": "linear", "min_learning_rate": 0.0, "warmup_steps": 0, "weight_decay": 0.0},
            **{"grad_clip": 0.0, "beta1": 0.8, "beta2": 0.95},
        }
    },
    "rates of embedding x 10, output x 3": {"optim": {"learning_rate": 3e-3, "embedding_rate": 10.0, "head_rate": 3.0}},
    "Muon for the matrices of blocks": {"optim": {"name": "muon", "muon_learning_rate": 0.06}},
    "value residuals": {"model": {"value_residual": True}},
    "learned skips": {"model": {"learned_skips": True}},
    "SwiGLU in place of squared ReLU": {"model": {"activation": "silu", "gated": True}},
}
"""What each line of the table adds to the one before."""


def configs() -> dict[str, dict]:
    """The options of each line of the table."""
    options, found = BASE, {}
    for name, change in PARTS.items():
        options = options | {section: options[section] | fields for section, fields in change.items()}
        found[name] = options
    return found


def train(name: str, options: dict, text: Path, runs: Path, steps: int, seed: int) -> float:
    """Trains a run, unless its result is stored; returns its last validation loss."""
    folder = runs / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{seed}-{steps}"
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))["val_loss"]
    run = {"run_dir": str(folder), "seed": seed, "data": {"path": [str(text)]}}
    config = from_dict(Config, options | run | {"train": options["train"] | {"num_steps": steps}}, name)
    if trainer.train(config):
        raise SystemExit(f"{folder} ended early")
    losses = [row["val_loss"] for row in read_metrics(folder) if "val_loss" in row]
    result.write_text(json.dumps({"part": name, "seed": seed, "val_loss": losses[-1]}), encoding="utf-8")
    return losses[-1]


def main() -> None:
    """Prints one row of the table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    options = parser.parse_args()
    compile_cache.start()
    losses: dict[str, list[float]] = {name: [] for name in options.only}
    for seed in options.seeds:
        for name in options.only:
            losses[name].append(train(name, configs()[name], options.text, options.runs, options.steps, seed))
            print(f"{name}, seed {seed}: {losses[name][-1]:.3f}", flush=True)
    print("\n| part | mean loss | spread | change |\n|---|---|---|---|")
    before = None
    for name, found in losses.items():
        mean, spread = statistics.mean(found), max(found) - min(found)
        print(f"| {name} | {mean:.3f} | {spread:.3f} | {'' if before is None else f'{mean - before:+.3f}'} |")
        before = mean


if __name__ == "__main__":
    main()
