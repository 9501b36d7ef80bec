"""Decodes bytes that arrive in pieces to text, and finds stop strings."""

import codecs
from collections.abc import Callable, Sequence


def make_text_stream() -> Callable[[bytes, bool], str]:
    """Returns `feed(new_bytes, final)`, which returns the new text that is certain.

    An incomplete character is held back. Bytes that can no longer become valid UTF-8 are returned as U+FFFD at once.
    `final` returns everything that was held back. Joined, the pieces equal `bytes.decode("utf-8", "replace")` of all
    bytes.
    """
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode


class StopFilter:
    """Cuts text that arrives in pieces before the first stop string, even if the string spans several pieces.

    The first stop string is the one that is complete first; if several end at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.found = tuple(stops), "", False

    def feed(self, new: str, final: bool = False) -> str:
        """Returns the new text that is certain. Text that may be the start of a stop string is held back until
        `final`.
        """
        if self.found:
            return ""
        text = self._held + new
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
