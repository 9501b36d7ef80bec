"""Questions and windows of their texts → batches with the position of the answer.

Shape suffixes: B windows, T position.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.batches.labelled import Encoded, Marks, padded, taken
from gptjax.errors import UserError
from gptjax.text.answers import Question
from gptjax.text.tokenizers.base import Tokenizer


class SpanBatch(NamedTuple):
    """A question and a window of its text in each row, padded at the end."""

    inputs: Any
    """int32 `[B, T]`."""
    lengths: Any
    """int32 `[B]`: tokens of each row; the last one does not belong to the text."""
    firsts: Any
    """int32 `[B]`: position of the text's first token."""
    targets: Any
    """int32 `[B, 2]`: positions of the answer's first and last token; 0: the row has no answer."""
    weights: Any
    """float32 `[B]`: 0 for padding rows."""


class Window(NamedTuple):
    """A window of a question's text."""

    question: int
    """Number of the question."""
    first: int
    """Position of the window's first text token in the row."""
    offsets: np.ndarray
    """Byte offset in the whole text at which each token of the window begins, and at which the last one ends."""


@dataclasses.dataclass(frozen=True)
class SpanSet(Encoded):
    """Encoded windows; `cut` says which are of a text that has several."""

    windows: Sequence[Window]

    def batch(self, numbers: np.ndarray, tokens: Sequence[np.ndarray], weights: np.ndarray) -> SpanBatch:
        """See `Encoded`."""
        inputs, lengths = padded(tokens, self.max_tokens)
        firsts = np.array([self.windows[n].first if n >= 0 else 0 for n in numbers], np.int32)
        return SpanBatch(inputs, lengths, firsts, *taken(self.targets, numbers, weights, empty=-1))


def encode_questions(
    examples: Sequence[Question], tokenizer: Tokenizer, marks: Marks, max_tokens: int, stride: int
) -> SpanSet:
    """Encodes each question with each window of its text; neighbouring windows overlap by `stride` tokens.

    A window that does not contain the whole answer has no answer: its target is position 0.

    Args:
        examples: Questions and their answers.
        tokenizer: The model's.
        marks: Token ids before the question, between it and the text, and at the end.
        max_tokens: Length of a window, including the question.
        stride: Overlap of two windows in tokens.

    Raises:
        UserError: A question leaves no room for more than `stride` tokens of its text, or there is no token to separate
            the two.
    """
    if not marks.delimiter:
        raise UserError(
            "task.delimiters=end_of_text: the tokenizer has no end-of-text token to put between question and text;"
            " set task.delimiters=learned"
        )
    tokens, windows, targets, cut = [], [], [], []
    for number, example in enumerate(examples):
        question = np.asarray(tokenizer.encode(example.question), np.int32)
        ids = np.asarray(tokenizer.encode(example.text), np.int32)
        before = np.concatenate([marks.start, question, marks.delimiter]).astype(np.int32)
        room = max_tokens - len(before) - len(marks.extract)
        if room <= stride:
            raise UserError(
                f"{example.where}: the question has {len(question)} tokens, which leaves {room} of"
                f" task.max_tokens={max_tokens} for the text, must leave more than task.stride={stride}"
            )
        ends = np.cumsum(tokenizer.byte_lengths[ids])
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        span = _token_span(example, offsets) if example.answers else None
        starts = range(0, max(1, len(ids) - stride), room - stride)
        for start in starts:
            part = ids[start : start + room]
            tokens.append(np.concatenate([before, part, marks.extract]).astype(np.int32))
            windows.append(Window(number, len(before), offsets[start : start + len(part) + 1]))
            inside = span is not None and start <= span[0] and span[1] < start + len(part)
            place = [len(before) + t - start for t in span] if inside and span is not None else [0, 0]
            targets.append(place)
            cut.append(len(starts) > 1)
    return SpanSet(tokens, np.array(targets, np.int32).reshape(-1, 2), np.array(cut, bool), max_tokens, windows)


def _token_span(example: Question, offsets: np.ndarray) -> tuple[int, int]:
    """The first and the last token that has a byte of the first answer."""
    begin = len(example.text[: example.start].encode())
    end = begin + len(example.answers[0].encode())
    first = int(np.searchsorted(offsets, begin, side="right")) - 1
    return first, int(np.searchsorted(offsets, end, side="left")) - 1
