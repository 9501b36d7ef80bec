"""Splits long texts into pieces of bounded size and batches short ones, to encode them on several threads."""

import re
from collections.abc import Iterable, Iterator

# Texts are split because tiktoken panics on a million spaces, and because one thread encodes one piece.
_PIECE_CHARACTERS = 2**16
# Positions at which a split does not change the ids under any published pattern: after a single newline that is not
# followed by "/" (o200k joins "/" to a newline), and before a single space between two letters.
_SAFE_CUT = re.compile(r"(?<=\S\n)(?=[^\s/])|(?<=[A-Za-z])(?= [A-Za-z])")


def split_text(text: str) -> Iterator[str]:
    """Splits a long text into pieces of bounded size, if possible such that the ids are those of the whole text.

    If there is no such position nearby (a million spaces, a million letters), the split changes the ids of a few
    characters, but they still decode to the same text.
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
    """Groups short pieces, to reduce the overhead per task of a thread."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= _PIECE_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
