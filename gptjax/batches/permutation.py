"""A random permutation of the numbers below n without a table: each element is computed on its own."""

import functools

import numpy as np

_ROUNDS = 6
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio
_SHIFT = np.uint64(32)


@functools.lru_cache(maxsize=64)
def draw_keys(seed: int, epoch: int) -> np.ndarray:
    """Draws 64-bit numbers from `(seed, epoch)`: one for free use, then the keys that `permute` takes."""
    keys = np.random.SeedSequence((seed, epoch)).generate_state(1 + _ROUNDS, np.uint64)
    keys.flags.writeable = False
    return keys


def shuffled(draws: np.ndarray, n: int, seed: int, first_epoch: int = 0) -> np.ndarray:
    """The item of each draw, counted over all epochs: an epoch draws each of `n` items once, in a new order."""
    epochs, places = np.divmod(draws, n)
    items = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        items[here] = permute(places[here], n, draw_keys(seed, first_epoch + int(epoch))[1:])
    return items


def permute(numbers: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Maps numbers in `[0, n)` to numbers in `[0, n)`, one to one.

    A Feistel network permutes the numbers below the smallest power of 4 that is at least n. It is applied again until
    the result is below n (cycle walking, fewer than 4 times on average).

    Args:
        numbers: int64.
        n: At least 1.
        keys: `_ROUNDS` numbers, uint64.

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, sections 4 and 5.
    """
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    result = numbers.astype(np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        result[outside] = _feistel(result[outside], half, keys)
        outside = result >= n
    return result.astype(np.int64)


def _feistel(numbers: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & mask
    for key in keys:
        mixed = (right + key) * _MULTIPLIER
        mixed = (mixed ^ (mixed >> _SHIFT)) * _MULTIPLIER
        left, right = right, left ^ ((mixed >> _SHIFT) & mask)
    return (left << half) | right
