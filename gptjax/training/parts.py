"""What a run consists of."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from gptjax.batches.ramps import sum_before
from gptjax.checkpoints.checkpoint import Checkpoints
from gptjax.config.run import Config
from gptjax.tasks.task import Task
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.training.in_flight import BatchHook
from gptjax.training.resolve import tokens_per_step


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that a run consists of."""

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

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a batch; on average, where batches differ."""
        return tokens_per_step(self.config, self.task)

    def tokens_before(self, step: int) -> int:
        """Tokens in the batches of all steps before `step`, counted from 0."""
        sizes = self.config.train.batch_sizes
        return sum_before([(first, round(size * self.task.tokens_per_row)) for first, size in sizes], step)
