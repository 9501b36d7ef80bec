"""A server in a process of its own, for tests and benchmarks."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Served(NamedTuple):
    """A server that takes requests."""

    process: subprocess.Popen
    url: str
    """With a slash at its end."""
    lines: list[str]
    """What it has written to standard error so far."""


@contextlib.contextmanager
def served(
    run_dir: Path, *flags: str, seconds: float = 120, module: str = "gptjax serve", **variables: str
) -> Iterator[Served]:
    """Starts a server on a free port of loopback, and kills it at the end where it still runs.

    `variables` are added to its environment.
    """
    command = [sys.executable, "-m", *module.split(), "--run_dir", str(run_dir)]
    if module == "gptjax serve":
        command += ["--port", "0", "--no-restart"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | variables
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))
    reader.start()
    try:
        wait_for(lambda: process.poll() is not None or any("http://" in line for line in lines), seconds)
        urls = [line.split()[-1] for line in lines if "http://" in line]
        assert urls, lines
        yield Served(process, urls[0], lines)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Returns when the condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.005)
