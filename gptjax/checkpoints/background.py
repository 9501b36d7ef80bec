"""Background work at low priority, in the processor time that the training loop leaves over."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

NICENESS_INCREASE = 10
"""Next to a loop that uses all cores, the work gets about a tenth of a core; training may have to wait for it."""


def lower_priority() -> None:
    """Lowers the priority of this thread and of threads that it starts later. On Linux each thread has its own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        lower = min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS_INCREASE)
        os.setpriority(os.PRIO_PROCESS, thread, lower)


def call_at_low_priority(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `function` in a low-priority thread and returns its result; threads that it starts inherit the priority.

    A separate thread makes the call, because an unprivileged thread cannot raise its priority again.
    """
    with ThreadPoolExecutor(1, "background", lower_priority) as caller:
        return caller.submit(function, *args, **kwargs).result()
