"""Hashes of the word n-grams of a text."""

import re

import numpy as np
import xxhash

_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def word_ngrams(text: str, n: int) -> np.ndarray:
    """Returns uint64 hashes of all word n-grams, in order. A text of fewer than n words has one hash, of all its words.

    Words are sequences of letters, digits and underscores, in lower case; punctuation and white space are ignored.
    """
    words = _WORD.findall(text.lower())
    if not words:
        return np.empty(0, np.uint64)
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), np.uint64, len(words))
    n = min(n, len(words))
    combined = np.zeros(len(words) - n + 1, np.uint64)
    for k in range(n):
        combined = combined * _MULTIPLIER + hashes[k : len(words) - n + 1 + k]
    return mix(combined)


def mix(hashes: np.ndarray) -> np.ndarray:
    """Spreads every bit of uint64 numbers over all bits (the finalizer of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))
