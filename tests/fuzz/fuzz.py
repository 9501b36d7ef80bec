"""How the fuzz tests run: fixed seeds, few cases in every test run, thousands in a slow one."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.cli import main
from gptjax.errors import UserError

SLOW = int(os.environ.get("FUZZ_CASES", "5000"))


def fuzz(fast: int, *strategies, **named) -> Callable:
    """Runs a test body on `fast` cases always, and on FUZZ_CASES (5,000) in slow runs; the same cases every time."""

    def decorate(body):
        def test(cases):
            rules = settings(
                max_examples=cases,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            rules(given(*strategies, **named)(body))()

        test.__name__ = body.__name__
        return pytest.mark.parametrize("cases", [fast, pytest.param(SLOW, marks=pytest.mark.slow)])(test)

    return decorate


def ends_well(error: UserError) -> None:
    """A refusal is one line of bearable length that can be printed."""
    text = str(error)
    assert text and "\n" not in text and "\r" not in text
    assert len(text) < 3000


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What must end in success or in one clear error."""
    try:
        yield
    except UserError as error:
        ends_well(error)


def run_command(*args: str) -> tuple[int, str]:
    """Runs a command; it must end with status 0, or with status 2 and one line. Returns the status and that line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(args)
    error = err.getvalue()
    assert status in (0, 2), (args, status, error)
    if status == 2:
        last = error.splitlines()[-1]
        assert last.startswith("gptjax: ") and "Traceback" not in error, (args, error)
    return status, error


ODD_TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "~", "~x/y", "..", "/", "\0", "\ud800", "\n", "nan", "1e999", "-0", "0x10", "1_0", "٣", "-"]
    ),
)
ODD_NUMBER = st.one_of(
    st.integers(-3, 5),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, 2**70, -(2**63), 10**30, 1e30, 1e-300, -0.0]),
)
ODD_VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), ODD_NUMBER, ODD_TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(ODD_TEXT, inner, max_size=3)),
    max_leaves=8,
)


def mutate(content: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    """Changes bytes at relative places: set, flip, delete, insert, cut, double."""
    data = bytearray(content)
    for kind, place, byte in edits:
        at = min(int(place * len(data)), max(0, len(data) - 1))
        if kind == "cut":
            del data[at:]
        elif kind == "insert":
            data.insert(at, byte)
        elif kind == "double":
            data[at:at] = data[at : at + 1 + byte]
        elif not data:
            continue
        elif kind == "set":
            data[at] = byte
        elif kind == "flip":
            data[at] ^= 1 << byte % 8
        elif kind == "delete":
            del data[at : at + 1 + byte % 8]
    return bytes(data)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "delete", "insert", "cut", "double"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=5,
)
