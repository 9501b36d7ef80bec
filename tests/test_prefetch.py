import threading
import time

import pytest

from gptjax.batches.prefetch import prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order():
    assert list(prefetch(lambda i: i * i, 3, 50)) == [i * i for i in range(3, 50)]
    assert list(prefetch(lambda i: i, 5, 5)) == []
    assert not threads()


def test_error_of_the_thread_is_raised_in_its_place():
    def make(i):
        if i == 3:
            raise KeyError("third")
        return i

    items = prefetch(make, 0, 10)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="third"):
        next(items)
    assert not threads()


def test_closing_early_ends_the_thread():
    items = prefetch(lambda i: i, 0, 10**9)
    assert next(items) == 0
    assert threads()
    items.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not threads()


def test_thread_works_ahead_by_the_depth_and_no_further():
    made = []
    items = prefetch(lambda i: made.append(i) or i, 0, 100, depth=3)
    next(items)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2, 3]
    list(items)
