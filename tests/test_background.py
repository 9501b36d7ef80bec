"""Saving has a lower priority than training."""

import os
import sys
import threading

import numpy as np
import pytest

from gptjax.checkpoints import checkpoint
from gptjax.checkpoints.background import NICENESS_INCREASE, call_at_low_priority, lower_priority
from gptjax.checkpoints.checkpoint import Checkpoints

linux = pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux alone")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def below(number: int) -> int:
    return min(19, number + NICENESS_INCREASE)


def of_a_new_thread() -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(niceness()))
    thread.start()
    thread.join()
    return found[0]


@linux
def test_threads_started_at_low_priority_inherit_it_and_the_caller_keeps_its_own():
    before = niceness()
    assert call_at_low_priority(of_a_new_thread) == below(before)
    assert niceness() == before == of_a_new_thread()


def test_exceptions_of_the_low_priority_thread_reach_the_caller():
    with pytest.raises(ZeroDivisionError):
        call_at_low_priority(divmod, 1, 0)


@linux
def test_lowering_the_lowest_priority_is_harmless():
    def three_times() -> int:
        for _ in range(3):
            lower_priority()
        return niceness()

    assert call_at_low_priority(three_times) == 19


@linux
def test_a_save_is_completed_at_low_priority(tmp_path, monkeypatch):
    found, write = [], checkpoint.write_manifest
    monkeypatch.setattr(checkpoint, "write_manifest", lambda *args: (found.append(niceness()), write(*args)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_items(1, {"params": {"w": np.ones(3, np.float32)}}, {}, None)
    checkpoints.close()
    assert found == [below(niceness())] and checkpoints.acknowledged == 1
