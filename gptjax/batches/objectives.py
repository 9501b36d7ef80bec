"""Objectives other than the next token.

An objective turns one document, or the part of it in a window, into inputs and targets. Documents are processed one by
one, so no target depends on another document. `arranged.py` makes batches of windows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.batches.pretraining import PrefixBatch
from gptjax.config.objective import FILL, MASK, MODES, SPANS, ObjectiveConfig
from gptjax.text.tokenizers.base import Tokenizer


class Arranged(NamedTuple):
    """One document as inputs and targets; arrays `[n]`."""

    inputs: np.ndarray
    targets: np.ndarray
    """Target at each position; -1: none."""
    positions: np.ndarray
    prefix: int = 0
    """Number of inputs at the start to which all others may attend."""


def pack(windows: Sequence[Sequence[Arranged]], block_size: int) -> PrefixBatch:
    """Concatenates the documents of each window; padding is its own segment without targets."""
    shape = len(windows), block_size
    inputs, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    ahead = np.zeros(shape, bool)
    for row, documents in enumerate(windows):
        start = 0
        for number, one in enumerate(documents):
            here = slice(start, start + len(one.inputs))
            inputs[row, here], targets[row, here] = one.inputs, one.targets
            segments[row, here], positions[row, here] = number, one.positions
            ahead[row, start : start + one.prefix] = True
            start = here.stop
        segments[row, start:] = len(documents)
    return PrefixBatch(inputs, targets, segments, positions, ahead)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The properties of the tokenizer that objectives use."""

    text_tokens: int
    """Ids below this one are ordinary text tokens."""
    end_of_text: int | None
    special: dict[str, int]
    """Ids of the objective's special tokens, by name."""
    joins: tuple[np.ndarray, np.ndarray]
    """bool `[text_tokens]` each: whether a token begins, and whether it ends, with a word character."""


Arrange = Callable[[ObjectiveConfig, Vocabulary, np.ndarray, np.random.Generator], Arranged]
"""Applies an objective to the tokens of a document (at least two). The number of inputs that it returns depends only on
the number of tokens and random choices."""


def vocabulary_of(tokenizer: Tokenizer, names: tuple[str, ...]) -> Vocabulary:
    """Describes a tokenizer that has the special tokens `names`."""
    special = {name: tokenizer.special_tokens[name] for name in names}
    size = min(special.values(), default=tokenizer.vocab_size)
    texts = [tokenizer.decode_bytes([i]) for i in range(size)]
    joins = tuple(
        np.array([text != b"" and _of_word(text[at]) for text in texts], bool) & _is_text(tokenizer, size)
        for at in (0, -1)
    )
    return Vocabulary(size, tokenizer.end_of_text, special, (joins[0], joins[1]))


def _of_word(byte: int) -> bool:
    return byte >= 128 or chr(byte).isalnum()


def _is_text(tokenizer: Tokenizer, size: int) -> np.ndarray:
    return np.arange(size) != (-1 if tokenizer.end_of_text is None else tokenizer.end_of_text)


def _next_token(tokens: np.ndarray, first_target: int = 1, prefix: int = 0) -> Arranged:
    """Predicts each token from earlier ones, starting at token number `first_target`."""
    targets = tokens[1:].copy()
    targets[: first_target - 1] = -1
    return Arranged(tokens[:-1], targets, np.arange(len(tokens) - 1), prefix)


def backward(_config: ObjectiveConfig, _vocabulary: Vocabulary, tokens: np.ndarray, _random) -> Arranged:
    """Predicts each token from later ones: reverses the document."""
    return _next_token(tokens[::-1])


def prefix(_config: ObjectiveConfig, _vocabulary: Vocabulary, tokens: np.ndarray, random) -> Arranged:
    """Prefix LM: predicts the text after a prefix of random length (at least one token). The prefix is
    bidirectional.
    """
    length = int(random.integers(1, len(tokens)))
    return _next_token(tokens, length, length)


def fill_in_the_middle(config: ObjectiveConfig, vocabulary: Vocabulary, tokens: np.ndarray, random) -> Arranged:
    """Moves the middle of a document after its prefix and suffix (arXiv:2207.14255, section 3).

    PSM: `PRE prefix SUF suffix MID middle`. SPM (the paper's variant 2): `PRE SUF suffix MID prefix middle`.
    End-of-text marks the end of the middle. Documents are split between tokens.
    """
    if random.random() >= config.fill_rate:
        return _next_token(tokens)
    end = [] if vocabulary.end_of_text is None else [vocabulary.end_of_text]
    pre, suf, mid = ([vocabulary.special[name]] for name in FILL)
    begin, text = (tokens[:1], tokens[1:]) if end == [tokens[0]] else (tokens[:0], tokens)
    if len(text) > 1 and end == [text[-1]]:
        text = text[:-1]
    first, second = np.sort(random.integers(0, len(text) + 1, 2))
    before, middle, after = text[:first], text[first:second], text[second:]
    if random.random() < config.suffix_first:
        parts = (begin, pre, suf, after, mid, before, middle, end)
    else:
        parts = (begin, pre, before, suf, after, mid, middle, end)
    return _next_token(np.concatenate(parts).astype(np.int32))


def masked(config: ObjectiveConfig, vocabulary: Vocabulary, tokens: np.ndarray, random) -> Arranged:
    """Predicts a share `rate` of the tokens, at least one, from all others. 80 % of them are replaced by the mask
    token, 10 % by a random token, and 10 % are unchanged (arXiv:1810.04805, section 3.1). The first token, which starts
    the document, is never predicted.
    """
    n = len(tokens)
    wanted = max(1, round(config.rate * n))
    if config.whole_words:
        begins, ends = vocabulary.joins
        joined = np.concatenate([[False, False], begins[tokens[2:]] & ends[tokens[1:-1]]])
        words = np.cumsum(~joined)[1:]  # word number of each token after the first
        order = random.permutation(np.unique(words))
        sizes = np.cumsum(np.bincount(words)[order])
        chosen = 1 + np.flatnonzero(np.isin(words, order[: 1 + np.searchsorted(sizes, wanted)]))
    else:
        chosen = 1 + random.permutation(n - 1)[:wanted]
    inputs, targets = tokens.copy(), np.full(n, -1, np.int32)
    targets[chosen] = tokens[chosen]
    share = random.random(len(chosen))
    replaced = np.where(share < 0.8, vocabulary.special[MASK], random.integers(0, vocabulary.text_tokens, len(chosen)))
    inputs[chosen] = np.where(share < 0.9, replaced, tokens[chosen])
    return Arranged(inputs, targets, np.arange(n))


def permutation(config: ObjectiveConfig, vocabulary: Vocabulary, tokens: np.ndarray, random) -> Arranged:
    """Permutation LM: puts tokens in a random order and predicts the last `rate` of them, each from earlier ones.

    XLNet's two streams become one causal sequence: each predicted token follows a mask token of the same position, and
    the output of the mask token predicts it. The mask token comes first, so it cannot attend to its target. Only
    position ids carry the order of the text.
    """
    n = len(tokens)
    count = max(1, round(config.rate * (n - 1)))
    order = np.concatenate([[0], 1 + random.permutation(n - 1)])
    known, predicted = order[: n - count], order[n - count :]
    twice = np.repeat(predicted, 2)[:-1]  # the last token predicts nothing
    positions = np.concatenate([known, twice])
    inputs, targets = tokens[positions], np.full(len(positions), -1, np.int32)
    places = len(known) + 2 * np.arange(count)
    inputs[places], targets[places] = vocabulary.special[MASK], tokens[predicted]
    return Arranged(inputs, targets, positions)


def span_corruption(config: ObjectiveConfig, vocabulary: Vocabulary, tokens: np.ndarray, random) -> Arranged:
    """Replaces spans of the text by sentinels; the spans follow the text as targets (arXiv:1910.10683, section
    3.1.4).
    """
    return _spans(vocabulary, tokens, config.rate, config.span_length, random, [])


def ul2(_config: ObjectiveConfig, vocabulary: Vocabulary, tokens: np.ndarray, random) -> Arranged:
    """One of UL2's seven denoisers with equal probability (arXiv:2205.05131, table 1): R removes few short spans, X
    long or many spans, S predicts the last quarter. A mode token at the start names the denoiser.
    """
    rate, length = ((0.15, 3), (0.15, 8), (0.5, 3), (0.5, 8), (0.15, 64), (0.5, 64), (0.25, 0))[random.integers(7)]
    r, x, s = ([vocabulary.special[name]] for name in MODES)
    if length:
        return _spans(vocabulary, tokens, rate, length, random, r if rate < 0.5 and length < 64 else x)
    tokens = np.concatenate([s, tokens]).astype(np.int32)
    known = min(len(tokens) - 1, max(2, round((1 - rate) * len(tokens))))
    return _next_token(tokens, known, known)


def _spans(vocabulary, tokens, rate, mean, random, mode) -> Arranged:
    """`mode first-token text-with-sentinels sentinel span sentinel span … sentinel`; loss after the text."""
    text = tokens[1:]
    n = len(text)
    noise = min(max(1, round(rate * n)), max(1, n - 1))
    count = min(max(1, round(noise / mean)), noise, max(1, n - noise), len(SPANS) - 1)
    removed, kept = _parts(noise, count, random), _parts(n - noise, count, random)
    stops = np.cumsum(np.stack([kept, removed], axis=1).reshape(-1))
    pieces = np.split(text, stops[:-1])
    sentinels = [[vocabulary.special[name]] for name in SPANS[: count + 1]]
    known = [mode, tokens[:1], *(part for i in range(count) for part in (pieces[2 * i], sentinels[i]))]
    wanted = [part for i in range(count) for part in (sentinels[i], pieces[2 * i + 1])]
    length = sum(len(part) for part in known)
    return _next_token(np.concatenate([*known, *wanted, sentinels[count]]).astype(np.int32), length, length)


def _parts(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Splits a number into `count` random parts; no part is 0 if possible."""
    if total < count:
        return np.full(count, total)
    cuts = np.sort(random.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


OBJECTIVES: dict[str, Arrange] = {
    "backward": backward,
    "prefix": prefix,
    "fill_in_the_middle": fill_in_the_middle,
    "masked": masked,
    "permutation": permutation,
    "span_corruption": span_corruption,
    "ul2": ul2,
}
"""The function of each `task.objective.kind`."""
