"""The log-probability of the last tokens of a sequence, given the earlier tokens.

`score_spans` scores sliding windows, multiple choice and the requests of lm_eval.

Shape suffixes: B span, T position, V vocabulary, D n_embd.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.model.gpt import Compute, hidden_states, logits
from gptjax.parallel.place import put
from gptjax.text.tokenizers.base import Tokenizer

SHORTEST = 16
"""Inputs are padded to this length times a power of two."""

Scorer = Callable[[dict, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Span(NamedTuple):
    """A sequence whose last tokens are scored."""

    tokens: np.ndarray
    """Token ids, at most `block_size + 1`."""
    scored: int
    """Number of scored tokens: at least 1, and fewer than `tokens` has."""


class SpanScore(NamedTuple):
    """The score of a span."""

    log_probability: float
    """Nats, summed over the scored tokens."""
    greedy: bool
    """Whether every scored token is the most likely one."""


def make_scorer(model: ModelConfig, compute: Compute) -> Scorer:
    """Returns a compiled `score(params, inputs_BT, targets_BT) -> (log_probability_B, greedy_B)`; a target of -1 is not
    scored.
    """
    # With an expert capacity, the score of a span would depend on the other spans in its batch.
    model = dataclasses.replace(model, expert_capacity=0.0)

    def score(params: dict, inputs_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions_BT = jax.lax.broadcasted_iota("int32", inputs_BT.shape, 1)
        x_BTD = hidden_states(model, params, inputs_BT, positions_BT, compute=compute)

        def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x_TD, targets_T = row
            logits_TV = logits(model, params, x_TD[None])[0]
            log_z_T = jax.nn.logsumexp(logits_TV, axis=-1)
            target_T = jnp.take_along_axis(logits_TV, jnp.maximum(targets_T, 0)[:, None], axis=-1)[:, 0]
            scored_T = targets_T >= 0
            most_likely_T = jnp.argmax(logits_TV, axis=-1).astype(targets_T.dtype) == targets_T
            return jnp.sum(target_T - log_z_T, where=scored_T), jnp.all(most_likely_T | ~scored_T)

        return jax.lax.map(one, (x_BTD, targets_BT))  # memory holds the logits of one sequence at a time

    return jax.jit(score)


def check_likelihood(config: Config, where: str) -> None:
    """Refuses a run whose model gives no probability of a text from left to right.

    Raises:
        UserError: It says why.
    """
    if reason := config.why_no_likelihood:
        raise UserError(
            f"{where}: task.kind={config.task.kind}, task.objective.kind={config.task.objective.kind}: the probability"
            f" of a text is needed here, and {reason}"
        )


def score_spans(
    scorer: Scorer,
    params: dict,
    spans: Sequence[Span],
    block_size: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    advance: Callable[[int], None] = lambda spans: None,
) -> list[SpanScore]:
    """Scores spans, in batches of similar length; returns the scores in the order of `spans`.

    Every batch has `batch_size` sequences and one of a few lengths, so that few programs are compiled.

    Args:
        scorer: Result of `make_scorer`.
        params: Parameters of the model.
        spans: Spans to score.
        block_size: Context length of the model.
        batch_size: Sequences in a batch.
        sharding: Sharding of batches.
        advance: Called with the number of spans of each finished batch.
    """
    found: list[SpanScore] = [SpanScore(0.0, True)] * len(spans)
    groups: dict[int, list[int]] = {}
    for number in sorted(range(len(spans)), key=lambda number: -len(spans[number].tokens)):
        groups.setdefault(padded_length(len(spans[number].tokens) - 1, block_size), []).append(number)
    for length, numbers in groups.items():
        for first in range(0, len(numbers), batch_size):
            chosen = numbers[first : first + batch_size]
            inputs_BT = np.zeros((batch_size, length), np.int32)
            targets_BT = np.full((batch_size, length), -1, np.int32)
            for row, number in enumerate(chosen):
                tokens, scored = spans[number]
                inputs = len(tokens) - 1
                inputs_BT[row, :inputs] = tokens[:-1]
                targets_BT[row, inputs - scored : inputs] = tokens[-scored:]
            sums_B, greedy_B = jax.device_get(scorer(params, *put((inputs_BT, targets_BT), sharding)))
            for row, number in enumerate(chosen):
                found[number] = SpanScore(float(sums_B[row]), bool(greedy_B[row]))
            advance(len(chosen))
    return found


def padded_length(inputs: int, block_size: int) -> int:
    """The length to which inputs are padded: 16, 32, 64, ..., at most `block_size`."""
    return min(block_size, max(SHORTEST, 1 << (inputs - 1).bit_length()))


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a context and its continuation as one text, and splits the ids after as many as the context alone has.

    White space at the end of the context is moved to the continuation, because tokenizers join it to the next word. An
    empty context is replaced by end-of-text.

    Raises:
        UserError: The text cannot be encoded, the continuation is empty, or the context is empty and the tokenizer has
            no end-of-text.
    """
    text = context.rstrip()
    continuation = context[len(text) :] + continuation
    before, whole = tokenizer.encode(text), tokenizer.encode(text + continuation)
    after = whole[len(before) :]
    if not len(after):  # the context alone has more ids than the whole text
        after = tokenizer.encode(continuation)
    if not len(after):
        raise UserError("an empty continuation cannot be scored; give it at least one character")
    if not len(before):
        if tokenizer.end_of_text is None:
            raise UserError("an empty context needs a tokenizer with end-of-text, which this run's has not; give text")
        before = np.array([tokenizer.end_of_text], np.int32)
    return before, after


def pair_span(before: np.ndarray, after: np.ndarray, block_size: int) -> Span:
    """The span that scores `after`, with as much of `before` as fits in the context.

    Raises:
        UserError: `after` alone does not fit.
    """
    if len(after) > block_size:
        raise UserError(
            f"a continuation of {len(after):,} tokens is longer than the model reads (model.block_size={block_size})"
        )
    return Span(np.concatenate([before, after])[-(block_size + 1) :], len(after))
