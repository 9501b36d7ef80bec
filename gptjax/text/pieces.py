"""Splits long texts into pieces of bounded size and batches short ones, to encode them on several threads."""

import os
import re
from collections.abc import Iterable, Iterator

# tiktoken panics on a million spaces, and one thread encodes one piece: so texts are cut.
_PIECE_CHARACTERS = 2**16
# Where a cut cannot change the ids under any of the published patterns: after a single newline that does not
# stand before "/" (o200k joins "/" to a newline), and before a single space between two letters.
_SAFE_CUT = re.compile(r"(?<=\S\n)(?=[^\s/])|(?<=[A-Za-z])(?= [A-Za-z])")


def split_text(text: str) -> Iterator[str]:
    """Cuts a long text into pieces of bounded size, where possible so that their ids are those of the whole.

    Where no such place is near (a million spaces, a million letters), the cut changes which ids a few
    characters get, not what they decode to.
    """
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = start + _PIECE_CHARACTERS
        near = _SAFE_CUT.search(text, end - _PIECE_CHARACTERS // 32, end) or _SAFE_CUT.search(
            text, end - _PIECE_CHARACTERS // 2, end
        )
        cut = near.start() if near else end
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text


def group_pieces(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Batches short pieces, so that the overhead of a thread's task is small."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= _PIECE_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
