"""Short sequences with targets of their own, several of them in a window: word tags and chats.

Shape suffixes: B windows, T position.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.batches.permutation import draw_keys, permute
from gptjax.batches.pretraining import Batch
from gptjax.batches.rows import ALL, Rows
from gptjax.text.labelled import Chat, Words
from gptjax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Asked:
    """Inputs of one sequence and what is asked at each; -1: nothing."""

    inputs: np.ndarray
    targets: np.ndarray


class EncodedWords(NamedTuple):
    """Sentences for tagging, as sequences in their order; a long sentence is several."""

    sequences: list[Asked]
    asked: list[np.ndarray]
    """Of each sequence, the positions at which its words' labels stand."""
    lengths: tuple[int, ...]
    """Words of each sentence."""
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class PackedSequences:
    """Sequences packed once into windows of `max_tokens`, each a segment; epochs differ in the windows' order."""

    sequences: Sequence[Asked]
    max_tokens: int
    seed: int

    @functools.cached_property
    def windows(self) -> list[list[int]]:
        """The sequences in each window, in a random order that follows from the seed."""
        n = len(self.sequences)
        order = permute(np.arange(n), n, draw_keys(self.seed, 0)[1:])
        windows, room = [], 0
        for number in order.tolist():
            size = len(self.sequences[number].inputs)
            if size > room:
                windows.append([])
                room = self.max_tokens
            windows[-1].append(number)
            room -= size
        return windows

    @property
    def tokens_per_epoch(self) -> int:
        """Positions of all sequences."""
        return sum(len(sequence.inputs) for sequence in self.sequences)

    @property
    def mean_tokens(self) -> float:
        """Positions of a window that hold a token."""
        return self.tokens_per_epoch / len(self.windows)

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> Batch:
        """Returns rows of the batch of `step`, from 0."""
        return self.pack([self.windows[number] for number in self._rows(step, batch_size, rows)])

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the lowest and the highest sequence of each row of the batch of `step`."""
        windows = (self.windows[number] for number in self._rows(step, batch_size))
        return [(min(window), max(window)) for window in windows]

    def _rows(self, step: int, batch_size: int, rows: Rows = ALL) -> list[int]:
        """The window of each row."""
        epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size)[rows], len(self.windows))
        return [
            int(permute(np.array([place]), len(self.windows), draw_keys(self.seed, int(epoch) + 1)[1:])[0])
            for epoch, place in zip(epochs, places, strict=True)
        ]

    def ordered(self, batch_size: int) -> Iterator[tuple[list[list[int]], Batch]]:
        """Yields every window once, with the numbers of its sequences; the last batch may hold empty windows."""
        windows = self.windows + [[]] * (-len(self.windows) % batch_size)
        for first in range(0, len(windows), batch_size):
            chosen = windows[first : first + batch_size]
            yield chosen, self.pack(chosen)

    def pack(self, windows: Sequence[Sequence[int]]) -> Batch:
        """Puts sequences, by number, into windows; what is left over is a segment without targets."""
        B, T = len(windows), self.max_tokens
        inputs, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
        targets, segments = np.full((B, T), -1, np.int32), np.zeros((B, T), np.int32)
        for row, numbers in enumerate(windows):
            start = 0
            for segment, number in enumerate(numbers):
                sequence = self.sequences[number]
                here = slice(start, start + len(sequence.inputs))
                inputs[row, here], targets[row, here] = sequence.inputs, sequence.targets
                segments[row, here], positions[row, here] = segment, np.arange(len(sequence.inputs))
                start = here.stop
            segments[row, start:] = len(numbers)
        return Batch(inputs, targets, segments, positions)


def encode_words(
    examples: Sequence[Words], tokenizer: Tokenizer, labels: Sequence[str], max_tokens: int, lookahead: int
) -> EncodedWords:
    """Encodes sentences for tagging: a word's label is asked `lookahead` tokens after the last one of the word.

    Each sentence begins with end-of-text, and ends with `lookahead` more of them, for words that have nothing behind
    them. A sentence that does not fit in `max_tokens` becomes several sequences; of a word that does not, the beginning
    is read.
    """
    number = {label: n for n, label in enumerate(labels)}
    filler = 0 if tokenizer.end_of_text is None else tokenizer.end_of_text
    encode = functools.cache(lambda text: tokenizer.encode(text)[: max_tokens - lookahead - 1])
    sequences, places = [], []
    for example in examples:
        pieces = [encode(word if i == 0 else f" {word}") for i, word in enumerate(example.words)]
        tags = [number[tag] for tag in example.tags] or [-1] * len(pieces)
        first = 0
        while first < len(pieces):
            lengths = np.cumsum([len(piece) for piece in pieces[first:]])
            last = first + max(1, int(np.searchsorted(lengths, max_tokens - lookahead - 1, side="right")))
            ids = [np.array([filler], np.int32), *pieces[first:last], np.full(lookahead, filler, np.int32)]
            inputs = np.concatenate(ids).astype(np.int32)
            asked = lengths[: last - first] + lookahead
            targets = np.full(len(inputs), -1, np.int32)
            targets[asked] = tags[first:last]
            sequences.append(Asked(inputs, targets))
            places.append(asked)
            first = last
    return EncodedWords(sequences, places, tuple(len(example.words) for example in examples), max_tokens)


def encode_chats(examples: Sequence[Chat], tokenizer: Tokenizer, max_tokens: int) -> tuple[list[Asked], int, int]:
    """Encodes chats: the loss is on the tokens of what is to be learned, and on the end-of-text after it.

    Returns:
        Sequences; how many lost their end because they are longer than `max_tokens`; how many were left out because
        nothing to learn was left.
    """
    ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    sequences, cut, left_out = [], 0, 0
    for example in examples:
        ids, learned = [np.array(ends, np.int32)], [np.zeros(len(ends), bool)]
        for text, learn in example.pieces:
            ids.append(tokenizer.encode(text))
            learned.append(np.full(len(ids[-1]), learn))
        ids.append(np.array(ends, np.int32))
        learned.append(np.full(len(ends), example.pieces[-1][1]))
        tokens, asked = np.concatenate(ids).astype(np.int32), np.concatenate(learned)
        cut += len(tokens) - 1 > max_tokens
        inputs = tokens[:-1][:max_tokens]
        targets = np.where(asked, tokens, -1)[1:][:max_tokens].astype(np.int32)
        if (targets >= 0).any():
            sequences.append(Asked(inputs, targets))
        else:
            left_out += 1
    return sequences, cut, left_out
