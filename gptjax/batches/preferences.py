"""Pairs of responses → batches with the targets of both, to compare their log-probabilities.

Shape suffixes: B pairs, T position.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.batches.labelled import Encoded, taken, widths
from gptjax.batches.packed import encode_chats
from gptjax.errors import UserError
from gptjax.text.labelled import Preference
from gptjax.text.tokenizers.base import Tokenizer


class PreferenceBatch(NamedTuple):
    """Two sequences for each row, the chosen one first, padded at the end."""

    inputs: Any
    """int32 `[B, 2, T]`."""
    targets: Any
    """int32 `[B, 2, T]`: the next token within the response, -1 elsewhere."""
    reference: Any
    """float32 `[B, 2]`: log-probability of each response under the reference model (the one before training)."""
    weights: Any
    """float32 `[B]`: 0 for padding rows."""


class PreferenceSet(Encoded):
    """Encoded pairs of `TargetSequence`; their targets are the log-probabilities under the reference."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer sequence of each pair."""
        return np.array([max(len(sequence.inputs) for sequence in pair) for pair in self.tokens], np.int64)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence.inputs) for pair in self.tokens for sequence in pair)

    def batch(self, numbers: np.ndarray, tokens: Sequence[Any], weights: np.ndarray) -> PreferenceBatch:
        """See `Encoded`."""
        longest = max((len(sequence.inputs) for pair in tokens for sequence in pair), default=1)
        T = next(width for width in widths(self.max_tokens) if width >= longest)
        inputs, targets = np.zeros((len(tokens), 2, T), np.int32), np.full((len(tokens), 2, T), -1, np.int32)
        for row, pair in enumerate(tokens):
            for side, sequence in enumerate(pair):
                inputs[row, side, : len(sequence.inputs)] = sequence.inputs
                targets[row, side, : len(sequence.targets)] = sequence.targets
        return PreferenceBatch(inputs, targets, *taken(self.targets, numbers, weights))


def encode_preferences(examples: Sequence[Preference], tokenizer: Tokenizer, max_tokens: int) -> PreferenceSet:
    """Encodes pairs as chats; their log-probabilities are 0 until the reference model computes them.

    Raises:
        UserError: The response of a pair begins after `max_tokens`, or both sequences are equal up to there.
    """
    pairs, cut = [], []
    for example in examples:
        assert example.rejected is not None  # rows of training have both
        found = encode_chats([example.chosen, example.rejected], tokenizer, max_tokens)
        if found.left_out:
            raise UserError(
                f"{example.where}: the response begins after task.max_tokens={max_tokens}; raise it, or remove the row"
            )
        first, second = found.sequences
        if np.array_equal(first.inputs, second.inputs) and np.array_equal(first.targets, second.targets):
            raise UserError(
                f"{example.where}: both responses are the same within task.max_tokens={max_tokens}; raise it, or"
                " remove the row"
            )
        pairs.append((first, second))
        cut.append(found.cut > 0)
    return PreferenceSet(pairs, np.zeros((len(pairs), 2), np.float32), np.array(cut, bool), max_tokens)
