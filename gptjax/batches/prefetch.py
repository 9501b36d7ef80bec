"""Makes batches on a thread while the device is busy with those before."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[T]:
    """Yields `make(start)` to `make(stop - 1)`, made in this order by one thread, at most `depth` ahead.

    What `make` raises is raised here, in its place in the order. Closing the iterator ends the thread.
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
            except BaseException as error:  # the consumer decides what becomes of it
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
