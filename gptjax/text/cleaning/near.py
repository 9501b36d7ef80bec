"""Near duplicates by MinHash and locality-sensitive hashing.

N is the number of documents, H the number of hash functions.

Source: Broder, On the resemblance and containment of documents, 1997; Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, chapter 3.
"""

import numpy as np
import xxhash

from gptjax.text.cleaning.ngrams import mix, word_ngrams

N_HASHES = 128
"""The estimate of a similarity s has the standard deviation sqrt(s * (1 - s) / 128): 0.035 at 0.8."""
NGRAM = 5
_RECALL = 0.99
_CHUNK = 2**12
_SEEDS_H = mix(np.arange(1, N_HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


def signature(text: str) -> np.ndarray:
    """Returns the MinHash signature, uint32 `[H]`: the lowest value of each hash function over the text's word
    5-grams.
    """
    shingles = np.unique(word_ngrams(text, NGRAM))
    if not len(shingles):  # a text without words is a duplicate only of an identical text
        shingles = np.array([xxhash.xxh3_64_intdigest(text.encode())], np.uint64)
    lowest_H = np.full(N_HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), _CHUNK):
        hashed_HS = shingles[None, start : start + _CHUNK] * _SEEDS_H[:, None]
        hashed_HS ^= hashed_HS >> np.uint64(29)
        hashed_HS *= _SEEDS_H[::-1, None]
        lowest_H = np.minimum(lowest_H, hashed_HS.min(axis=1))
    return (lowest_H >> np.uint64(32)).astype(np.uint32)


def rows_per_band(threshold: float) -> int:
    """The largest number of rows such that pairs at the threshold become candidates with a probability of 0.99."""
    choices = [r for r in (1, 2, 4, 8, 16, 32) if 1 - (1 - threshold**r) ** (N_HASHES // r) >= _RECALL]
    return max(choices, default=1)


def find_near_duplicates(signatures_NH: np.ndarray, threshold: float) -> np.ndarray:
    """Returns bool `[N]`: True for every document of a group of near duplicates except the first.

    Documents with equal hashes in all rows of a band are in one bucket. Each is compared with the first and with the
    previous document of its bucket. Two documents are in one group if the share of equal hashes is at least
    `threshold`; groups that share a document are merged.

    Args:
        signatures_NH: uint32.
        threshold: Jaccard similarity.
    """
    rows = rows_per_band(threshold)
    group = np.arange(len(signatures_NH))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = int(group[i])
        return i

    for start in range(0, N_HASHES, rows):
        for a, b in _candidates(signatures_NH[:, start : start + rows], signatures_NH, threshold):
            low, high = sorted((root(int(a)), root(int(b))))
            group[high] = low
    return group != np.arange(len(group))


def _candidates(band_NR: np.ndarray, signatures_NH: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs `[P, 2]` of documents in one bucket of a band whose estimated similarity reaches the threshold."""
    keys = np.zeros(len(band_NR), np.uint64)
    for column in band_NR.T:
        keys = mix(keys ^ column.astype(np.uint64)) + np.uint64(1)
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    firsts = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(len(order)), 0))
    later = np.flatnonzero(same) + 1
    pairs = np.concatenate(
        [np.stack([order[later - 1], order[later]], 1), np.stack([order[firsts[later]], order[later]], 1)]
    )
    similar = [
        (signatures_NH[a] == signatures_NH[b]).mean(axis=1) >= threshold
        for a, b in (pairs[start : start + _CHUNK].T for start in range(0, len(pairs), _CHUNK))
    ]
    return pairs[np.concatenate(similar)] if similar else pairs
