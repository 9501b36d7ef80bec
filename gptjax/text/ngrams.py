"""The n-grams of a text, as buckets of a hash table: of words, and of the characters of each word.

The first half of the table is for words, the second for characters, so that each kind can be scaled to length 1.
"""

import functools
import re
from collections import Counter

import numpy as np
import xxhash

BUCKETS = 2**19
HALF = BUCKETS // 2
SIZES = (3, 4, 5)
"""Characters of an n-gram; the space before and after a word counts."""
_WORD = re.compile(r"\w+")


def ngram_counts(text: str, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the buckets of a text's n-grams, each once, int32 `[F]`, and how often each occurs, float32 `[F]`.

    Case does not count. `longest` is the largest number of words of an n-gram.
    """
    words = _WORD.findall(text.lower())
    counts = Counter(
        _hash(" ".join(words[start : start + n])) for n in range(1, longest + 1) for start in range(len(words) - n + 1)
    )
    for word in words:
        counts.update(_inside(word))
    return np.array(list(counts), np.int32), np.array(list(counts.values()), np.float32)


@functools.lru_cache(2**16)
def _inside(word: str) -> list[int]:
    """The buckets of the n-grams of a word's characters."""
    word = f" {word} "
    return [HALF + _hash(word[start : start + n]) for n in SIZES for start in range(len(word) - n + 1)]


def _hash(ngram: str) -> int:
    return xxhash.xxh32_intdigest(ngram.encode()) % HALF
