"""Makes batches on a background thread while the device computes on earlier ones."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[T]:
    """Yields `make(start)` to `make(stop - 1)`. One thread makes them in this order, at most `depth` in advance.

    An exception of `make` is raised here, at its place in the order. Closing the iterator ends the thread.
    """
    made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    closed = threading.Event()

    def work() -> None:
        for i in range(start, stop):
            room.acquire()
            if closed.is_set():
                return
            try:
                made.put((make(i), None))
            except BaseException as error:  # raised in the consumer
                made.put((None, error))
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item, error = made.get()
            if error is not None:
                raise error
            room.release()
            yield item  # pyright: ignore[reportReturnType]: an item, where there is no error
    finally:
        closed.set()
        room.release()
        thread.join()
