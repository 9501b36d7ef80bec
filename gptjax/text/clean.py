"""Normalises documents and removes empty, short and duplicate ones."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

import xxhash

from gptjax.config.data import DataConfig
from gptjax.text.sources import Document

_CARRIAGE_RETURN = re.compile(r"\r\n?")


def clean(documents: Iterable[Document], data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Applies data.newlines, data.unicode, data.min_characters and data.drop_duplicates, in this order.

    Duplicates are found by a 128-bit hash of the normalised text, which costs about 100 bytes of memory for
    each document that is kept. Empty documents are always removed.

    Args:
        documents: In the order of the corpus; the first of equal documents is kept.
        data: The rules.
        counts: Incremented at "empty", "short" and "duplicate" for each removed document.
    """
    seen: set[bytes] = set()
    for document in documents:
        text = normalise(document.text, data)
        if not text:
            counts["empty"] += 1
        elif len(text) < data.min_characters:
            counts["short"] += 1
        elif data.drop_duplicates and not _add(seen, xxhash.xxh3_128_digest(text.encode())):
            counts["duplicate"] += 1
        else:
            yield Document(text, document.where)


def normalise(text: str, data: DataConfig) -> str:
    """Applies data.newlines and data.unicode."""
    if data.newlines == "unix":
        text = _CARRIAGE_RETURN.sub("\n", text)
    if data.unicode == "NFC":
        text = unicodedata.normalize("NFC", text)
    return text


def _add(seen: set[bytes], digest: bytes) -> bool:
    """Adds to the set; returns False if it was in the set before."""
    before = len(seen)
    seen.add(digest)
    return len(seen) > before
