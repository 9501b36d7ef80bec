"""Packs short sequences with targets at some positions into windows: tagged words and chats.

Shape suffixes: B windows, T position.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.batches.objectives import Arranged, pack
from gptjax.batches.permutation import shuffled
from gptjax.batches.pretraining import Batch
from gptjax.batches.rows import ALL, Rows
from gptjax.errors import UserError
from gptjax.text.chats import Chat
from gptjax.text.labelled import Words
from gptjax.text.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class TargetSequence:
    """Inputs of one sequence and the target at each position; -1: none."""

    inputs: np.ndarray
    targets: np.ndarray


class EncodedWords(NamedTuple):
    """Sentences for tagging, as sequences in their order; a long sentence is several sequences."""

    sequences: list[TargetSequence]
    positions: list[np.ndarray]
    """For each sequence, the positions that predict the labels of its words."""
    lengths: tuple[int, ...]
    """Number of words of each sentence."""
    cut: tuple[bool, ...]
    """Whether a word of the sentence was cut."""
    max_tokens: int
    labels: tuple[str, ...]
    """Those that the head predicts, then tags of these sentences that training has not seen."""


class EncodedChats(NamedTuple):
    """Chats as sequences."""

    sequences: list[TargetSequence]
    cut: int
    """Number of chats that were cut at `max_tokens`."""
    left_out: int
    """Number of chats that were left out because the first `max_tokens` tokens have no target."""
    target_bytes: int
    """UTF-8 bytes of the target text."""


@dataclasses.dataclass(frozen=True)
class PackedSequences:
    """Sequences packed into windows of `max_tokens`, each a segment. Epochs differ only in the order of windows."""

    sequences: Sequence[TargetSequence]
    max_tokens: int
    seed: int

    @functools.cached_property
    def windows(self) -> list[list[int]]:
        """The sequences in each window, in a random order that depends only on the seed."""
        n = len(self.sequences)
        order = shuffled(np.arange(n), n, self.seed)
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
        """Mean number of tokens in a window."""
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
        draws = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
        return shuffled(draws, len(self.windows), self.seed, first_epoch=1).tolist()

    def ordered(self, batch_size: int) -> Iterator[tuple[list[list[int]], Batch]]:
        """Yields every window once, with the numbers of its sequences; the last batch may hold empty windows."""
        windows = self.windows + [[]] * (-len(self.windows) % batch_size)
        for first in range(0, len(windows), batch_size):
            chosen = windows[first : first + batch_size]
            yield chosen, self.pack(chosen)

    def pack(self, windows: Sequence[Sequence[int]]) -> Batch:
        """Puts sequences, by number, into windows; padding is its own segment without targets."""
        chosen = [[self.sequences[number] for number in numbers] for numbers in windows]
        arranged = [[Arranged(one.inputs, one.targets, np.arange(len(one.inputs))) for one in row] for row in chosen]
        return Batch(*pack(arranged, self.max_tokens)[:4])


def encode_words(
    examples: Sequence[Words], tokenizer: Tokenizer, labels: Sequence[str], max_tokens: int, lookahead: int
) -> EncodedWords:
    """Encodes sentences for tagging: a word's label is predicted `lookahead` tokens after the word's last token.

    Each sentence begins with end-of-text, and ends with `lookahead` more of them for the labels of the last words. A
    sentence that does not fit in `max_tokens` becomes several sequences. A word that does not fit is cut.

    Raises:
        UserError: `max_tokens` leaves no room for a token of a word.
    """
    room = max_tokens - lookahead - 1
    if room < 1:
        raise UserError(
            f"task.lookahead={lookahead} must be at most task.max_tokens - 2 = {max_tokens - 2}: a window holds"
            " end-of-text, the tokens of a word, and the lookahead tokens after it"
        )
    unseen = {tag for example in examples for tag in example.tags} - set(labels)
    labels = (*labels, *sorted(unseen))
    number = {label: n for n, label in enumerate(labels)}
    filler = 0 if tokenizer.end_of_text is None else tokenizer.end_of_text
    encode = functools.cache(tokenizer.encode)
    sequences, places, cut = [], [], []
    for example in examples:
        whole = [encode(word if i == 0 else f" {word}") for i, word in enumerate(example.words)]
        cut.append(any(len(piece) > room for piece in whole))
        pieces = [piece[:room] for piece in whole]
        tags = [number[tag] for tag in example.tags] or [-1] * len(pieces)
        first = 0
        while first < len(pieces):
            lengths = np.cumsum([len(piece) for piece in pieces[first:]])
            last = first + max(1, int(np.searchsorted(lengths, room, side="right")))
            ids = [np.array([filler], np.int32), *pieces[first:last], np.full(lookahead, filler, np.int32)]
            inputs = np.concatenate(ids).astype(np.int32)
            positions = lengths[: last - first] + lookahead
            targets = np.full(len(inputs), -1, np.int32)
            targets[positions] = tags[first:last]
            sequences.append(TargetSequence(inputs, targets))
            places.append(positions)
            first = last
    lengths = tuple(len(example.words) for example in examples)
    return EncodedWords(sequences, places, lengths, tuple(cut), max_tokens, labels)


def encode_chats(examples: Sequence[Chat], tokenizer: Tokenizer, max_tokens: int) -> EncodedChats:
    """Encodes each chat as one text between two end-of-text tokens, if the tokenizer has one.

    Targets are all tokens with a character of the assistant's messages, even if they also have characters before or
    after the message. If the last message is the assistant's, the end-of-text after it is a target too.
    """
    ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    sequences, cut, left_out, target_bytes = [], 0, 0, 0
    for example in examples:
        ids = tokenizer.encode(example.text)
        tokens = np.concatenate([ends, ids, ends]).astype(np.int32)
        is_target = np.concatenate(
            [np.zeros(len(ends), bool), _overlaps(example, tokenizer, ids), np.full(len(ends), example.ends_in_target)]
        )
        cut += len(tokens) - 1 > max_tokens
        inputs = tokens[:-1][:max_tokens]
        targets = np.where(is_target, tokens, -1)[1:][:max_tokens].astype(np.int32)
        if (targets >= 0).any():
            sequences.append(TargetSequence(inputs, targets))
            of_text = targets[(targets >= 0) & ~np.isin(targets, ends)]
            target_bytes += int(tokenizer.byte_lengths[of_text].sum())
        else:
            left_out += 1
    return EncodedChats(sequences, cut, left_out, target_bytes)


def _overlaps(chat: Chat, tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Whether each token of a chat's text has a character of a target span."""
    stops = np.cumsum(tokenizer.byte_lengths[ids])
    starts = stops - tokenizer.byte_lengths[ids]
    found = np.zeros(len(ids), bool)
    for first, end in chat.targets:
        first_byte, end_byte = (len(chat.text[:place].encode()) for place in (first, end))
        found |= (starts < end_byte) & (stops > first_byte)
    return found
