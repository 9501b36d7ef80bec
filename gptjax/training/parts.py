"""The parts of a run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from gptjax.batches.ramps import sum_before
from gptjax.checkpoints.checkpoint import Checkpoints
from gptjax.config.run import Config
from gptjax.tasks.task import Source, Task
from gptjax.text.counts import leaves_out
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.training.in_flight import BatchHook
from gptjax.training.resolve import tokens_per_step


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run."""

    config: Config
    run_dir: Path
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    task: Task
    train_step: Any
    """Jitted; the state is donated."""
    checkpoints: Checkpoints
    evaluation_hook: BatchHook
    """Called before each batch of an evaluation."""
    data: list[dict[str, Any]]
    """Sizes of the training and validation data, for the report: see `describe_data`."""

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in a batch, averaged if batches differ."""
        return tokens_per_step(self.config, self.task)

    def tokens_before(self, step: int) -> int:
        """Tokens in the batches of all steps before `step`, counted from 0."""
        sizes = self.config.train.batch_sizes
        return sum_before([(first, round(size * self.task.tokens_per_row)) for first, size in sizes], step)


def describe_data(source: Source) -> list[dict[str, Any]]:
    """A row for each split of each source: documents, tokens and bytes of text, or examples; and what was left out."""
    rows = []
    for name, dataset in [("", source.dataset)] if source.dataset else source.mixture.items():
        left_out = {reason: n for reason, n in dataset.manifest.get("counts", {}).items() if leaves_out(reason) and n}
        for split, part in (("train", dataset.train), ("validation", dataset.validation)):
            sizes = {"documents": part.n_documents, "tokens": part.n_tokens, "bytes": part.n_bytes}
            rows.append({"source": name, "split": split, **sizes, **({"left out": left_out} if left_out else {})})
    for name, examples in source.examples.items():
        rows += [
            {"source": name, "split": split, "examples": len(part)}
            for split, part in (("train", examples.train), ("validation", examples.validation))
        ]
    return rows
