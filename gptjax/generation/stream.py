"""Text from bytes that arrive in pieces."""

import codecs
from collections.abc import Callable


def make_text_stream() -> Callable[[bytes, bool], str]:
    """Returns `feed(new_bytes, final)`, which returns the text that is certain by now.

    A character whose bytes have not all come is held back; bytes that cannot become valid UTF-8 any more come out
    as U+FFFD at once. With `final` everything held back comes out. The pieces join to what
    `bytes.decode("utf-8", "replace")` makes of all bytes.
    """
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode
