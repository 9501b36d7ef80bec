"""How far the host runs ahead of the device.

A dispatched step cannot be cancelled, so a signal waits for all that were dispatched. A device needs a step ahead only
while steps are short; long ones are dispatched one at a time.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax

AHEAD = 0.25
"""Seconds of work that may be dispatched and unfinished."""


class InFlight:
    """Results that were dispatched and are perhaps not computed yet."""

    def __init__(self):
        self._results: deque[Any] = deque()
        self._seconds = math.inf
        self._finished = time.monotonic()

    def add(self, result: Any) -> None:
        """Takes the arrays of a dispatched call; they must not be donated before they are computed."""
        self._results.append(result)

    def wait(self) -> None:
        """Returns when the unfinished calls will take no longer than `AHEAD`, as far as earlier ones tell."""
        while len(self._results) > AHEAD / self._seconds:
            jax.block_until_ready(self._results.popleft())
            now = time.monotonic()
            self._seconds, self._finished = max(now - self._finished, 1e-6), now


class BatchHook:
    """Wraps compiled functions so that `before_batch` is called before each of their calls."""

    def __init__(self):
        self.before_batch: Callable[[], None] = lambda: None

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function` with the hook; of its calls only a few are unfinished at a time."""
        in_flight = InFlight()

        def call(*args: Any) -> Any:
            self.before_batch()
            result = function(*args)
            in_flight.add(result)
            in_flight.wait()
            return result

        return call
