"""Multiple choice by likelihood: finds the most likely continuation of a context."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.benchmarks import Item
from gptjax.evaluation.few_shot import prompts
from gptjax.evaluation.likelihood import Span, SpanScore, encode_pair, pair_span
from gptjax.evaluation.statistics import mean
from gptjax.text.tokenizers.base import Tokenizer


class ChoiceResults(NamedTuple):
    """Results of each item."""

    right: np.ndarray
    """Whether the right choice is the most likely one. For a single continuation: whether greedy decoding gives it."""
    right_per_byte: np.ndarray
    """Like `right`, but with log-probabilities divided by the UTF-8 bytes of the choice. Empty for single
    continuations.
    """
    answer_nll: np.ndarray
    """Negative log-probability of the right continuation, in nats."""

    def __str__(self) -> str:
        if len(self.right_per_byte):
            return f"accuracy {mean(self.right)} · per byte {mean(self.right_per_byte)} · {len(self.right):,} items"
        nll = mean(self.answer_nll)
        perplexity = math.exp(min(nll.value, 700.0))
        return (
            f"accuracy {mean(self.right)} · perplexity {perplexity:.2f} ± {perplexity * nll.error:.2f}"
            f" · {len(self.right):,} items"
        )


def choice_spans(
    items: Sequence[Item], examples: Sequence[Item], shots: int, tokenizer: Tokenizer, block_size: int
) -> tuple[list[Span], int]:
    """The spans of all continuations, item by item, and the number of items whose context was cut at its start.

    Raises:
        UserError: An item cannot be encoded, or a continuation does not fit in the context; the message names the item.
    """
    spans, cut = [], 0
    for item in items:
        too_long = False
        for context, continuation in zip(prompts(item, examples, shots), item.continuations, strict=True):
            try:
                before, after = encode_pair(tokenizer, context, continuation)
                spans.append(pair_span(before, after, block_size))
            except UserError as error:
                raise UserError(f"{item.where}: {error}") from None
            too_long |= len(before) + len(after) > block_size + 1
        cut += too_long
    return spans, cut


def choice_results(items: Sequence[Item], scores: Sequence[SpanScore]) -> ChoiceResults:
    """The results of each item, given the scores of `choice_spans`."""
    right, per_byte, answer_nll, first = [], [], [], 0
    for item in items:
        found = scores[first : first + len(item.continuations)]
        first += len(found)
        answer_nll.append(-found[item.answer].log_probability)
        if len(found) == 1:
            right.append(found[0].greedy)
            continue
        likelihoods = np.array([score.log_probability for score in found])
        right.append(int(likelihoods.argmax()) == item.answer)
        # Like lm_eval, without the space before it.
        sizes = np.array([max(1, len(text.removeprefix(" ").encode())) for text in item.continuations])
        per_byte.append(int((likelihoods / sizes).argmax()) == item.answer)
    return ChoiceResults(np.array(right, float), np.array(per_byte, float), np.array(answer_nll))
