"""Limits how far the host runs ahead of the device.

A dispatched step cannot be cancelled, so a signal must wait for all dispatched steps. Only short steps need to be
dispatched ahead to keep the device busy; long steps are dispatched one at a time.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax

AHEAD = 0.25
"""Seconds of work that may be dispatched but unfinished."""


class InFlight:
    """Results that were dispatched and may not be computed yet."""

    def __init__(self):
        self._results: deque[Any] = deque()
        self._seconds = math.inf
        self._finished = time.monotonic()

    def add(self, result: Any) -> None:
        """Adds the result arrays of a dispatched call; they must not be donated before they are computed."""
        self._results.append(result)

    def wait(self) -> None:
        """Waits until the unfinished calls will take at most `AHEAD`, estimated from earlier calls."""
        while len(self._results) > AHEAD / self._seconds:
            jax.block_until_ready(self._results.popleft())
            now = time.monotonic()
            self._seconds, self._finished = max(now - self._finished, 1e-6), now


class BatchHook:
    """Wraps compiled functions so that `before_batch` runs before each call."""

    def __init__(self):
        self.before_batch: Callable[[], None] = lambda: None

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function` with the hook; only a few of its calls are unfinished at a time."""
        in_flight = InFlight()

        def call(*args: Any) -> Any:
            self.before_batch()
            result = function(*args)
            in_flight.add(result)
            in_flight.wait()
            return result

        return call
