"""What happens around a run: signals, and one writer for a run directory."""

import contextlib
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from gptjax.errors import UserError
from gptjax.parallel import cluster

LOCK_FILE = "lock"


EXIT_DIVERGED = 3  # status of a run that stopped because step after step made no update


class Signals:
    """What SIGTERM, SIGINT and SIGHUP do. A SIGHUP that is ignored, as under nohup, stays so.

    Until `begin` there is nothing to save: the first one ends the process at once, with a line, even while it compiles.
    What is on the disk is then as after a kill, from which the next start goes on. After `begin` the first one
    is remembered, so that the loop can finish its step and save; a second one ends at once.

    Use as a context manager around all of a run, in the main thread.
    """

    def __init__(self):
        self.received: int | None = None
        self._begun = False
        self._ending = threading.Lock()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        # Python calls handlers between two of its instructions, and there may be none for minutes: reading from a pipe,
        # a thread learns of a signal at once.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def begin(self) -> None:
        """From now on there is something to save."""
        self._begun = True

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._writer)
        self._watcher.join()
        os.close(self._reader)

    def _watch(self) -> None:
        while raw := os.read(self._reader, 1):
            if raw[0] in self._previous and not self._begun:
                self._end(raw[0])

    def _remember(self, number: int, _frame) -> None:
        if not self._begun:
            self._end(number)
        elif self.received is not None:
            os._exit(128 + number)
        else:
            self.received = number

    def _end(self, number: int) -> None:
        if not self._ending.acquire(blocking=False):
            return  # the other thread is about to
        name = signal.Signals(number).name
        line = f"gptjax: stopped by {name} before the first step; the next start goes on with what is prepared\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
        os._exit(128 + number)


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
