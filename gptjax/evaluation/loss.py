"""Measures the loss of a model on fixed windows of text."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from gptjax.batches.pairs import PairBatch
from gptjax.batches.pretraining import Batch, PrefixBatch
from gptjax.config.model import ModelConfig
from gptjax.errors import UserError
from gptjax.model.gpt import Compute
from gptjax.model.loss import batch_loss, loss_options
from gptjax.parallel.place import put

EvalStep = Callable[[dict, Any], tuple[jax.Array, jax.Array]]


NO_TARGETS = "no token can be predicted: each document has a single token, or is too short for the objective"


class Evaluation(NamedTuple):
    """Results of an evaluation, with their names in `metrics.jsonl`."""

    val_loss: float
    """Nats per target token."""
    perplexity: float
    bits_per_byte: float | None
    """Bits per byte of UTF-8 text, comparable between tokenizers; None if not every token of the text is a target."""

    def row(self) -> dict[str, float]:
        """Returns the results for `metrics.jsonl`."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f" · {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.val_loss:.4f} · perplexity {self.perplexity:.2f}{bits}"


class MixtureEvaluation(NamedTuple):
    """Results of each source of a mixture, and their means, weighted by the sources' weights at the first step."""

    val_loss: float
    perplexity: float
    bits_per_byte: float
    sources: dict[str, Evaluation]

    def row(self) -> dict[str, float]:
        """For `metrics.jsonl`: the means, and the loss of each source as `NAME/val_loss`."""
        means = {"val_loss": self.val_loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return means | {f"{name}/val_loss": scores.val_loss for name, scores in self.sources.items()}

    def __str__(self) -> str:
        mean = Evaluation(self.val_loss, self.perplexity, self.bits_per_byte)
        return f"{mean} · {', '.join(f'{name} {scores.val_loss:.4f}' for name, scores in self.sources.items())}"


def mean_evaluation(weights: dict[str, float], sources: dict[str, Evaluation]) -> MixtureEvaluation:
    """Averages the losses of sources by their weights; a source of weight 0 is measured but does not count."""
    total = sum(weights.values())
    loss, bits = (
        sum(weights[name] * getattr(scores, field) for name, scores in sources.items()) / total
        for field in ("val_loss", "bits_per_byte")
    )
    return MixtureEvaluation(loss, math.exp(min(loss, 700.0)), bits, sources)


def make_eval_step(model: ModelConfig, compute: Compute) -> EvalStep:
    """Returns `eval_step(params, batch) -> (nll, count)`: the summed loss and the number of targets.

    The leaves of a batch are `[B, T]`. There is no dropout, and the loss has no regularisers. Callers jit the function.
    """
    options = loss_options(model)

    def eval_step(params: dict, batch: Batch | PrefixBatch | PairBatch) -> tuple[jax.Array, jax.Array]:
        loss = batch_loss(model, options, compute, params, batch, None)
        return loss.nll, loss.count

    return eval_step


def measure(
    eval_step: EvalStep,
    params: dict,
    batches: Iterable[Batch | PrefixBatch | PairBatch],
    sharding: jax.sharding.Sharding,
    bytes_per_token: float | None,
) -> Evaluation:
    """Averages the loss over all targets of all batches: the sum of all losses is divided by the number of targets.

    `bytes_per_token` is None if not every token of the text is a target.
    """
    return evaluation_of(*sum_loss(eval_step, params, batches, sharding), bytes_per_token)


def sum_loss(
    eval_step: EvalStep,
    params: dict,
    batches: Iterable[Batch | PrefixBatch | PairBatch],
    sharding: jax.sharding.Sharding,
) -> tuple[float, float]:
    """Returns the summed loss of all targets in nats, and the number of targets."""
    sums: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        sums.append(eval_step(params, put(batch, sharding)))
        jax.block_until_ready(sums[-2:][0])  # limits the number of batches on the device
    nll, count = (math.fsum(float(value) for value in values) for values in zip(*sums, strict=True))
    return nll, count


def evaluation_of(nll: float, count: float, bytes_per_token: float | None, name: str = "the text") -> Evaluation:
    """Computes loss, perplexity and bits per byte from a summed loss.

    Raises:
        UserError: There was no target; the message has the `name` of the text.
    """
    if not count:
        raise UserError(f"{name}: {NO_TARGETS}; give other text")
    loss = nll / count
    bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    return Evaluation(loss, math.exp(min(loss, 700.0)), bits)
