"""Text from bytes that arrive in pieces, and where it ends."""

import codecs
from collections.abc import Callable, Sequence


def make_text_stream() -> Callable[[bytes, bool], str]:
    """Returns `feed(new_bytes, final)`, which returns the text that is certain by now.

    A character whose bytes have not all come is held back; bytes that cannot become valid UTF-8 any more come out
    as U+FFFD at once. With `final` everything held back comes out. The pieces join to what
    `bytes.decode("utf-8", "replace")` makes of all bytes.
    """
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode


class StopFilter:
    """Cuts text that arrives in pieces before the first of some stop strings, wherever the pieces divide it.

    The first is the one that is complete first; of several that end at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.found = tuple(stops), "", False

    def feed(self, new: str, final: bool = False) -> str:
        """Returns the text that is certain by now; what may begin a stop string is held back until `final`."""
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
    """Length of the longest end of the text that begins `stop` without completing it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
