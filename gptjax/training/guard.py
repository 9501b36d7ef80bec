"""What happens around a run: signals, and one writer for a run directory."""

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from gptjax.errors import UserError
from gptjax.parallel import cluster

LOCK_FILE = "lock"


EXIT_DIVERGED = 3  # status of a run that stopped because step after step made no update


class Signals:
    """Remembers the first SIGTERM, SIGINT or SIGHUP, so that the loop can finish its step and save; a second one ends
    at once. A SIGHUP that is ignored, as under nohup, stays so.

    Use as a context manager around the loop.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _remember(self, number: int, _frame) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number


def exit_status(received: int) -> int:
    """128 + the signal's number, as shells report it; 0 where none came (0)."""
    return 128 + received if received else 0


@contextlib.contextmanager
def locked_by_first(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for all processes of a run: process 0 locks it, the others make sure that they see it.

    Raises:
        UserError: Another run holds it, it cannot be written to, or it is not the same folder for all of them.
    """
    with contextlib.ExitStack() as stack:
        with cluster.together():
            if cluster.is_first():
                stack.enter_context(locked(run_dir))
        owners = cluster.gather(_owner(run_dir))
        for number, owner in enumerate(owners):
            if owner != owners[0]:
                raise cluster.SharedError(
                    f"run_dir={run_dir}: process {number} does not see what process 0 writes there; name a folder on a"
                    " file system that all of them share"
                )
        yield


def _owner(run_dir: Path) -> str:
    try:
        return (run_dir / LOCK_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for this process; the lock goes with the process, however it ends.

    Raises:
        UserError: Another process holds it, or it cannot be written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        opened = open(run_dir / LOCK_FILE, "a+")  # noqa: SIM115 (closed by the with below)
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written to: {error.strerror}; name another folder") from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(f"{run_dir}: is in use by {owner}; wait for it, or give another run_dir") from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        os.fsync(file.fileno())  # so that processes on other machines see it
        yield
