"""The one exception that a user is meant to read."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something that the user can put right.

    The message is one line: what is wrong, where (file, row, field, value), the rule, and the nearest right
    thing. The command line prints it without a traceback and exits with status 2. Names and values in it may hold
    line breaks; they become spaces.

    Attributes:
        unused: Name of the option that has no effect, if that is what is wrong; else empty.
    """

    def __init__(self, message: str, unused: str = ""):
        super().__init__(" ".join(message.splitlines()))
        self.unused = unused


@contextmanager
def readable_values(where: str) -> Iterator[None]:
    """Turns the failure to read a value of a file, such as a list in place of a number, into one line.

    Raises:
        UserError: A value in `where` is of a wrong kind.
    """
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{where}: has a value of a wrong kind: {type(error).__name__}: {error}") from None


def one_line(error: BaseException) -> str | None:
    """The one-line message of an error for the user; None if the error is a bug of the program."""
    if isinstance(error, UserError):
        message = str(error)
    elif isinstance(error, OSError):
        message = f"{error.filename or 'the system'}: {error.strerror or error}"
    elif isinstance(error, MemoryError):
        message = f"not enough memory: {error}"
    elif is_out_of_memory(error):
        message = f"not enough memory on the device; make train.micro_batch_size or the model smaller: {error}"
    else:
        return None
    line = " ".join(message.splitlines())
    return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-1000:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX says that a device had no memory left; compiled programs raise it as ValueError."""
    return isinstance(error, RuntimeError | ValueError) and "RESOURCE_EXHAUSTED" in str(error)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the closest option, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(options), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
