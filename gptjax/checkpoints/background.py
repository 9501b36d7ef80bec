"""Work beside the training loop, done with what the loop leaves of the processor."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

STEPS_BACK = 10
"""Of niceness: a tenth of a core is left against a loop that wants all of it, because the work may be waited for."""


def give_way() -> None:
    """Lowers the priority of this thread, and of those that it starts from now on. Linux has one for each thread."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        lower = min(19, os.getpriority(os.PRIO_PROCESS, thread) + STEPS_BACK)
        os.setpriority(os.PRIO_PROCESS, thread, lower)


def started_from_below(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function` and returns its result; the threads that it starts give way, this thread does not.

    An unprivileged thread cannot take its priority back, so another one makes the call.
    """
    with ThreadPoolExecutor(1, "background", give_way) as caller:
        return caller.submit(function, *args, **kwargs).result()
