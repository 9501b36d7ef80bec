"""Runs of characters that came before in the corpus, at any place and of any content.

L is the shortest length of such a run. A window is a run of exactly L characters; a character is repeated if it lies in
a window that occurred before. A suffix array finds the same runs (Lee et al., Deduplicating Training Data Makes
Language Models Better, arXiv:2107.06499, section 4.1). Here windows are compared by hashes of 64 bits, in several
passes over the corpus. Each pass sorts a part of the hashes, so memory grows with the corpus only by one bit for each
character.
"""

from collections.abc import Callable, Iterable

import numpy as np

from gptjax.text.cleaning.ngrams import mix

WINDOWS_PER_PASS = 2**24
"""About 16 bytes of memory for each, and as much again while they are sorted."""


def window_hashes(text: str, length: int) -> np.ndarray:
    """Returns a hash of each window, uint64 `[max(0, len(text) - length + 1)]`."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < length:
        return np.empty(0, np.uint64)
    hashes, size = mix(codes), 1  # of all windows of `size` characters
    while 2 * size <= length:
        hashes, size = _join(hashes[:-size], hashes[size:]), 2 * size
    rest = length - size  # two windows that overlap cover the length
    return _join(hashes[: len(hashes) - rest], hashes[rest:]) if rest else hashes


def find_repeated(read: Callable[[], Iterable[str]], length: int) -> np.ndarray:
    """Returns packed bits, one for each character of all texts in turn: whether a window begins there that came before.

    Args:
        read: Returns the texts in their order; called once for each pass and once before.
        length: L.
    """
    sizes = [len(text) for text in read()]
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    repeated = np.zeros(-(-int(starts[-1]) // 8), np.uint8)
    n_windows = sum(max(0, size - length + 1) for size in sizes)
    passes = max(1, -(-n_windows // WINDOWS_PER_PASS))
    for number in range(passes):
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for start, text in zip(starts, read(), strict=False):
            hashes = window_hashes(text, length)
            places = np.flatnonzero(hashes % np.uint64(passes) == number)
            found.append((hashes[places], places + start))
        if not found:
            break
        hashes, places = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        order = np.argsort(hashes, kind="stable")  # the first occurrence stays the first
        later = places[order[1:][hashes[order[1:]] == hashes[order[:-1]]]]
        np.bitwise_or.at(repeated, later >> 3, np.uint8(128) >> (later & 7).astype(np.uint8))
    return repeated


def without_repeated(text: str, start: int, repeated: np.ndarray, length: int) -> str:
    """Returns the text without the characters of windows that came before.

    Args:
        text: One of the texts.
        start: Number of characters in the texts before it.
        repeated: As `find_repeated` returns it.
        length: L.
    """
    first = start // 8
    bits = np.unpackbits(repeated[first : -(-(start + len(text)) // 8)])[start - 8 * first :][: len(text)]
    if not bits.any():
        return text
    edges = np.zeros(len(text) + 1, np.int64)
    begins = np.flatnonzero(bits)
    np.add.at(edges, begins, 1)
    np.add.at(edges, begins + length, -1)
    kept = np.cumsum(edges[:-1]) == 0
    bounds = np.flatnonzero(np.diff(kept, prepend=False, append=False))
    return "".join(text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True))


def _join(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return mix(left ^ mix(right + np.uint64(0x9E3779B97F4A7C15)))
