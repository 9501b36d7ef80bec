"""Work beside the training loop that takes only what the loop leaves of the processor."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

NICENESS = 10
"""Of such work: a tenth of a core against a step that wants all of it, and no less, because it may be waited for."""


def give_way() -> None:
    """Lowers the priority of this thread, and of those that it starts from now on. Linux has one for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def started_from_below(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function` and returns its result; the threads that it starts give way, this thread does not.

    An unprivileged thread cannot take its priority back, so another one makes the call.
    """
    with ThreadPoolExecutor(1, "background", give_way) as caller:
        return caller.submit(function, *args, **kwargs).result()
