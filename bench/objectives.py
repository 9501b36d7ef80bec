"""Trains a small model with each objective on a text, and on the same text with its characters shuffled.

    python bench/objectives.py TEXT [--steps 300] [KIND ...]

Prints the validation loss of both, in nats per target. Shuffled characters tell nothing of each other: the loss of a
control below the entropy of single characters would mean that targets are visible.
"""

import argparse
import math
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from gptjax.config.data import DataConfig
from gptjax.config.model import ModelConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.train import TrainConfig
from gptjax.machine import compile_cache
from gptjax.report.metrics import read_metrics
from gptjax.training import trainer

KINDS = (
    *("causal", "backward", "fill_in_the_middle", "prefix", "multi_token", "masked", "permutation"),
    *("span_corruption", "ul2"),
)


def config_of(kind: str, text: Path, folder: Path, steps: int) -> Config:
    """A run of four blocks over characters."""
    model = ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, bidirectional=kind == "masked")
    return Config(
        run_dir=str(folder / f"{kind}-{text.stem}"),
        cache_dir=str(folder / "cache"),
        model=model,
        tokenizer=TokenizerConfig(kind="chars"),
        data=DataConfig(path=(str(text),)),
        optim=OptimConfig(learning_rate=2e-3, min_learning_rate=2e-4, warmup_steps=20, beta2=0.99),
        train=TrainConfig(
            num_steps=steps, batch_size=16, eval_every=0, eval_windows=128, save_every=0, sample_tokens=0
        ),
        task=TaskConfig(objective=ObjectiveConfig(kind=kind)),
    )


def measure(config: Config) -> tuple[float, float]:
    """Trains a run; returns its last validation loss and the seconds that it took."""
    started = time.monotonic()
    if trainer.train(config):
        raise SystemExit(f"{config.run_dir} ended early")
    losses = [row["val_loss"] for row in read_metrics(Path(config.run_dir)) if "val_loss" in row]
    return losses[-1], time.monotonic() - started


def main() -> None:
    """Prints one row of a table for each objective."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    compile_cache.start()
    characters = list(options.text.read_text(encoding="utf-8"))
    counts, total = Counter(characters), len(characters)
    entropy = -math.fsum(count / total * math.log(count / total) for count in counts.values())
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        shuffled = Path(temporary) / "shuffled.txt"
        random.Random(0).shuffle(characters)
        shuffled.write_text("".join(characters), encoding="utf-8")
        for kind in options.kinds:
            (loss, seconds), (control, _) = (
                measure(config_of(kind, text, Path(temporary), options.steps)) for text in (options.text, shuffled)
            )
            rows.append(f"| `{kind}` | {loss:.3f} | {control:.3f} | {seconds:.0f} s |")
            print(rows[-1], flush=True)
    print(f"\n{options.steps} steps; entropy of single characters: {entropy:.3f} nats")
    print("\n".join(["| objective | text | shuffled | time |", "|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
