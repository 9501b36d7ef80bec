"""Windows of text for objectives other than the next token; each is a pure function of its number.

T is a position of a window.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from gptjax.batches.objectives import OBJECTIVES, Arranged, Vocabulary, pack
from gptjax.batches.pretraining import Batch, PackedWindows, PrefixBatch
from gptjax.batches.rows import ALL, Rows
from gptjax.config.objective import NEXT, ObjectiveConfig
from gptjax.errors import UserError
from gptjax.text.shards import TokenSplit

TRAINING, VALIDATION = 2, 3
"""Constants that separate random streams of one seed from each other and from those of other batches."""
SHORTEST_PAIR = 6
"""Tokens of a document that can become two parts."""
NOTED_WINDOWS = 64
"""Number of windows in which lost tokens are counted."""


@dataclasses.dataclass(frozen=True)
class ArrangedWindows:
    """Endless batches of windows for an objective, like `PackedWindows`.

    The length of a window is chosen so that one document always fits. If a window has many documents, its end may not
    fit; `note` counts the lost tokens.
    """

    split: TokenSplit
    block_size: int
    seed: int
    attend_across_documents: bool
    objective: ObjectiveConfig
    vocabulary: Vocabulary
    skipped: frozenset[int] = frozenset()
    """Numbers of documents that are skipped."""

    @functools.cached_property
    def windows(self) -> PackedWindows:
        """The windows of text before the objective is applied."""
        return PackedWindows(self.split, self.length, self.seed, self.attend_across_documents)

    @functools.cached_property
    def length(self) -> int:
        """Tokens of text in a window, without the last target."""
        return text_length(self.objective, self.vocabulary, self.block_size)

    @property
    def tokens_per_epoch(self) -> int:
        """Positions in one pass."""
        return self.windows.windows_per_epoch * self.block_size

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> Batch | PrefixBatch:
        """Returns rows of the batch of `step`, from 0."""
        numbers = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
        starts = self.windows.starts(numbers)
        return self._pack([self._window(TRAINING, int(n), s)[0] for n, s in zip(numbers, starts, strict=True)])

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the first and the last document in each row of the batch of `step`."""
        return self.windows.documents(step, batch_size)

    def evaluation(self, n_windows: int, batch_size: int) -> Iterator[Batch | PrefixBatch]:
        """Returns batches of fixed windows, evenly spaced over the stream; every call returns the same ones.

        Args:
            n_windows: Number of windows; 0, or more than there are: all.
            batch_size: The last batch is filled with rows without targets.

        Raises:
            UserError: The stream has fewer than two tokens.
        """
        if self.split.n_tokens < 2:
            raise UserError(
                f"the validation split has {self.split.n_tokens} tokens, must have at least 2; give it more text"
            )
        length = self.length
        total = -(-(self.split.n_tokens - 1) // length)
        chosen = min(n_windows or total, total)
        starts = [i * total // chosen * length for i in range(chosen)]
        for first in range(0, chosen, batch_size):
            here = range(first, min(first + batch_size, chosen))
            found = [self._window(VALIDATION, starts[i] // length, starts[i])[0] for i in here]
            yield self._pack(found + [[]] * (batch_size - len(found)))

    def note(self) -> str:
        """A log line about lost tokens in the first windows; empty if there are none."""
        numbers = np.arange(min(NOTED_WINDOWS, self.windows.windows_per_epoch))
        starts = self.windows.starts(numbers)
        lost = sum(self._window(TRAINING, int(n), s)[1] for n, s in zip(numbers, starts, strict=True))
        total = len(numbers) * (self.windows.block_size + 1)
        return (
            f"{100 * lost / total:.1f} % of the tokens of {len(numbers)} windows do not fit and are left out"
            if lost
            else ""
        )

    def _window(self, purpose: int, number: int, start: int) -> tuple[list[Arranged], int]:
        """The inputs and targets of each document of window `number`, and the number of tokens that do not fit."""
        random = np.random.default_rng((self.seed if purpose == TRAINING else 0, purpose, number))
        arrange, room = OBJECTIVES[self.objective.kind], self.block_size
        found, lost = [], 0
        for tokens in self._pieces(int(start)):
            seed = random.integers(2**63)
            used, one, answer = len(tokens), None, -1
            if self.objective.next_sentence:
                tokens, answer = self._pair(tokens, random)
            while used >= 2:
                one = arrange(self.objective, self.vocabulary, tokens[:used], np.random.default_rng(seed))
                if len(one.inputs) <= room:
                    break
                used, one = used - (len(one.inputs) - room), None
            if one is None:
                lost += len(tokens)
                continue
            lost += len(tokens) - used
            if answer >= 0 and used == len(tokens):
                one.targets[0] = answer
            found.append(one)
            room -= len(one.inputs)
        return found, lost

    def _pair(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, int]:
        """Two parts of a document with end-of-text between them, as many tokens as before, and the token that says
        whether the second part follows the first one. In half of the pairs it is text from a random place instead.

        Documents that are too short for two parts are returned as they are, with -1.
        """
        end, n = self.vocabulary.end_of_text, len(tokens)
        assert end is not None  # training refuses other tokenizers
        if n < SHORTEST_PAIR:
            return tokens, -1
        first = int(random.integers(2, n - 2))
        size, follows = n - first - 1, random.random() < 0.5
        if follows:
            second = tokens[first : first + size]
        else:
            begin = int(random.integers(0, max(1, self.split.n_tokens - size)))
            second = self.split.slice(begin, begin + size)
        pair = np.concatenate([tokens[:first], [end], second]).astype(tokens.dtype)
        return pair, self.vocabulary.special[NEXT[0] if follows else NEXT[1]]

    def _pieces(self, start: int) -> Iterator[np.ndarray]:
        """The tokens of each document in a window; end-of-text follows a document that ends in it."""
        split = self.split
        stop = min(start + self.length + 1, split.n_tokens)
        tokens = split.slice(start, stop)
        apart = split.n_documents > 1 and (not self.attend_across_documents or bool(self.skipped))
        begins = split.document_starts(start, stop) - start if apart else np.empty(0, np.int64)
        cuts = np.unique(np.concatenate([[0], begins, [len(tokens)]])).tolist()
        # With masking, no position predicts the next token, so the token after the window is not needed.
        closed = split.end_of_text is not None and self.objective.kind != "masked"
        number = split.document_at(start)
        for document, (first, end) in enumerate(itertools.pairwise(cuts), number):
            piece = tokens[first : min(end + closed, len(tokens))]
            if len(piece) > 1 and document not in self.skipped:
                yield piece

    def _pack(self, windows: list[list[Arranged]]) -> Batch | PrefixBatch:
        packed = pack(windows, self.block_size)
        return packed if self.objective.has_prefix else Batch(*packed[:4])


def text_length(objective: ObjectiveConfig, vocabulary: Vocabulary, block_size: int) -> int:
    """Length of the longest window of text (tokens, without the last target) that always fits in `block_size` inputs.

    Raises:
        UserError: No window is long enough.
    """
    arrange = OBJECTIVES[objective.kind]

    def too_long(length: int) -> bool:
        tokens = np.zeros(length + 1, np.int32)
        draws = range(64 if objective.kind in ("ul2", "fill_in_the_middle") else 1)  # random choices of the length
        return any(
            len(arrange(objective, vocabulary, tokens, np.random.default_rng(draw)).inputs) > block_size
            for draw in draws
        )

    length = bisect.bisect_left(range(1, block_size + 1), True, key=too_long)
    if length < 4:
        raise UserError(f"model.block_size={block_size} is too short for task.objective.kind={objective.kind}")
    return length
