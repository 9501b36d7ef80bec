"""Derives a whole config from the depth of the model, by published rules (`--size`, `--depth`).

- Width and heads: 64 times the depth wide, with heads of width 64, so as many heads as layers.
- Steps: 20 tokens per parameter outside the embeddings (arXiv:2203.15556), but at most 16 epochs, after which repeated
  text has almost no value (arXiv:2305.16264, section 5).
- Batch: 0.2920 C^0.3271 tokens for C FLOPs of training (arXiv:2401.02954, equation 1).
- Learning rate: 0.003239 - 0.0001395 ln N for N parameters outside the embeddings (arXiv:2001.08361, equation D.1).
"""

import dataclasses
import math
from typing import Literal

from gptjax.config.rules import not_negative
from gptjax.errors import UserError

SIZES = {"small": 4, "medium": 8, "large": 12}
"""Depth of each size."""
HEAD_WIDTH = 64
TOKENS_PER_PARAMETER, MOST_PASSES = 20, 16
BYTES_PER_TOKEN = 4
"""Rough value for English text and a vocabulary of a few thousand tokens."""
MOST_MICRO_BATCH = 2**14
"""Largest number of tokens in a forward pass."""
DEEPEST = 48
"""Deeper models are far outside the range of sizes for which the learning rate rule was fitted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DialConfig:
    """Size of the model and run, without a config file."""

    size: Literal["none", "small", "medium", "large"] = "none"
    """Choose shape, batch size, learning rate and steps by a model size: small is depth 4, medium 8, large 12."""
    depth: int = 0
    """Number of layers, instead of size; the other options follow from it. 0: not used."""

    def __post_init__(self):
        not_negative("", self, "depth")
        if self.depth and self.size != "none":
            raise UserError(f"size={self.size} and depth={self.depth} are both set; give one")
        if self.depth > DEEPEST:
            raise UserError(f"depth={self.depth} must be at most {DEEPEST}")

    @property
    def layers(self) -> int:
        """The depth; 0: neither size nor depth is set."""
        return self.depth or SIZES.get(self.size, 0)


@dataclasses.dataclass(frozen=True)
class Dialed:
    """The chosen options."""

    values: dict
    """Nested values of a config."""
    lines: tuple[str, ...]
    """Log lines with the chosen values and their rules."""


def dial(depth: int, corpus_bytes: int) -> Dialed:
    """Returns the options for a model of `depth` layers.

    Args:
        depth: At least 1.
        corpus_bytes: Size of the text; 0: unknown.
    """
    width = HEAD_WIDTH * depth
    context, vocabulary = (256, 4096) if depth < 6 else (512, 8192) if depth < 12 else (1024, 16384)
    parameters = 12 * depth * width**2
    rate = float(f"{0.003239 - 0.0001395 * math.log(parameters):.2g}")
    tokens, why = TOKENS_PER_PARAMETER * parameters, f"{TOKENS_PER_PARAMETER} tokens per parameter"
    if corpus_bytes and MOST_PASSES * corpus_bytes / BYTES_PER_TOKEN < tokens:
        tokens = max(1, round(MOST_PASSES * corpus_bytes / BYTES_PER_TOKEN))
        why = f"{MOST_PASSES} passes over about {corpus_bytes / 1e6:,.1f} MB of text"
    flops = 6.0 * parameters * tokens
    batch_tokens = 0.2920 * flops**0.3271
    batch = 2 ** max(3, round(math.log2(batch_tokens / context)))
    steps = max(10, round(tokens / (batch * context)))
    micro = min(batch, max(1, MOST_MICRO_BATCH // context))
    often = max(1, steps // 10)
    values = {
        "model": {"n_layer": depth, "n_head": depth, "n_embd": width, "block_size": context, "vocab_multiple": 64},
        "tokenizer": {"kind": "bpe", "vocab_size": vocabulary},
        "optim": {"learning_rate": rate, "beta2": 0.95 if batch * context >= 2**16 else 0.99},
        "train": {"num_steps": steps, "batch_size": batch, "eval_every": often, "save_every": often}
        | ({"micro_batch_size": micro} if micro < batch else {}),
    }
    lines = (
        f"model       {depth} layers, {width} wide, {depth} heads, {context} tokens of context"
        f" ({parameters / 1e6:,.1f} M parameters outside the embeddings)",
        f"steps       {steps:,} ({why}: {tokens / 1e6:,.1f} M tokens)",
        f"batch       {batch} sequences = {batch * context:,} tokens (0.2920 x FLOPs^0.3271)",
        f"rate        {rate:g} (0.003239 - 0.0001395 ln N), warm-up, cosine to a tenth",
        f"tokenizer   bpe, {vocabulary:,} tokens",
    )
    return Dialed(values, lines)
