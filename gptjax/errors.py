"""The one exception that a user is meant to read."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can put right.

    The message is one line: what is wrong, where (file, row, field, value), the rule, and the nearest right
    thing. The command line prints it without a traceback and exits with status 2. Names and values in it may hold
    line breaks; they become spaces.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the closest option, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(options), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
