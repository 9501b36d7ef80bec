"""Assigns documents to training or validation, by the hash of their text."""

import itertools
from collections.abc import Callable, Iterable

import xxhash

from gptjax.errors import UserError

_RANKED_DOCUMENTS = 64

Split = Callable[[str], list[tuple[str, str]]]
"""Splits a text into `(split, part)`: one part, except for a corpus of a single document."""


def choose_split(texts: Iterable[str], fraction: float) -> Split:
    """Assigns texts to "train" or "validation".

    A single document is split: its first `int(n * (1 - fraction))` characters are for training. Up to 64 documents are
    ranked by the hash of their text, and those with the lowest hashes (at least one) are for validation. With more
    documents, those with a hash below `fraction` are for validation. So a document and its copies stay in their split
    when other documents are added.

    Args:
        texts: The corpus; at most 65 documents are read.
        fraction: Share of validation text.

    Raises:
        UserError: The corpus cannot be split into two different parts.
    """
    hashes = [text_hash(text) for text in itertools.islice(texts, _RANKED_DOCUMENTS + 1)]
    if len(hashes) == 1:
        return lambda text: _cut(text, fraction)
    if len(hashes) > _RANKED_DOCUMENTS:
        return lambda text: [("validation" if text_hash(text) < fraction * 2**64 else "train", text)]
    distinct = sorted(set(hashes))
    if len(distinct) == 1:
        raise UserError(f"all {len(hashes)} documents are equal: none is left for validation")
    held_out = set(distinct[: min(len(distinct) - 1, max(1, round(len(distinct) * fraction)))])
    return lambda text: [("validation" if text_hash(text) in held_out else "train", text)]


def nearest_fraction(hashes: Iterable[int], empty: str) -> float:
    """The nearest validation fraction that leaves a document for split `empty`, given the hashes of all documents."""
    shares = [one / 2**64 for one in hashes]
    if empty == "validation":
        return float(f"{min(shares) * 1.001 + 1e-9:.4g}")
    return float(f"{max(shares) * 0.999:.4g}")


def text_hash(text: str) -> int:
    """The XXH3-64 of a text, by which it is assigned."""
    return xxhash.xxh3_64_intdigest(text.encode())


def _cut(text: str, fraction: float) -> list[tuple[str, str]]:
    at = int(len(text) * (1 - fraction))
    if not 0 < at < len(text):
        raise UserError(
            f"the only document has {len(text)} characters: data.validation_fraction={fraction} leaves none for"
            f" {'train' if at == 0 else 'validation'}"
        )
    return [("train", text[:at]), ("validation", text[at:])]
