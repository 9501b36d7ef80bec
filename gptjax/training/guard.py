"""Signal handling, and the lock that allows only one writer of a run directory."""

import contextlib
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gptjax.errors import UserError
from gptjax.parallel import cluster

LOCK_FILE = "lock"
EXIT_DIVERGED = 3
"""Exit status of a run that stopped because too many consecutive steps made no update."""


class Abandoned(Exception):
    """An evaluation or a sample was interrupted because a signal asked the run to stop."""


class Signals:
    """Handles SIGTERM, SIGINT and SIGHUP. If SIGHUP is ignored, as under nohup, it stays ignored.

    Before `begin` there is nothing to save: the first signal prints a line and ends the process at once, even during
    compilation. After `begin` the first signal prints a line and is stored in `received`, so that the loop can finish
    its step and save. A second signal ends the process at once without saving.

    Use as a context manager around a whole run, in the main thread.
    """

    def __init__(self):
        self.received: int | None = None
        self._begun = False
        self._ending = threading.Lock()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        # Python runs handlers in the main thread between two bytecodes, and a long step or a compilation is a single
        # bytecode. So the handler does nothing, and a thread reads the signal numbers from a pipe as they arrive.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, lambda *_: None)
        return self

    def begin(self) -> None:
        """From now on the first signal stops the run after its step instead of at once."""
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
            if raw[0] in self._previous:
                self._handle(raw[0])

    def _handle(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self._begun:
            self._end(number, f"stopped by {name} before the first step; the next start reuses prepared data")
        elif self.received is not None:
            self._end(number, f"stopped by a second signal ({name}); nothing was saved since the first one")
        else:
            self.received = number
            _tell(f"{name}: Stopping after this step, then saving; a second signal ends at once, without saving")

    def _end(self, number: int, message: str) -> None:
        if self._ending.acquire(blocking=False):
            _tell(message)
            os._exit(128 + number)


def _tell(message: str) -> None:
    """Writes a line to standard error from any thread; on a terminal, below the live progress line."""
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(10) if os.isatty(2) else ''}gptjax: {message}\n".encode())


def exit_status(received: int) -> int:
    """Returns 128 + the signal's number, as shells report it; 0 if there was no signal (`received` is 0)."""
    return 128 + received if received else 0


@contextlib.contextmanager
def locked_by_first(run_dir: Path) -> Iterator[None]:
    """Locks the run directory for all processes of a run. Process 0 holds the lock; the others check that they see it.

    Raises:
        UserError: Another run holds the lock, the folder is not writable, or processes see different folders.
    """
    with contextlib.ExitStack() as stack:
        with cluster.all_or_none():
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
    """Locks the run directory for this process. The system releases the lock when the process ends, even by a crash.

    On an error the lock file is removed, and also the directory if this call created it and it is empty.

    Raises:
        UserError: Another process holds the lock, or the directory is not writable.
    """
    missing = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        opened = _open_locked(path)
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written to: {error.strerror}; name another folder") from None
    with opened as file:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        os.fsync(file.fileno())  # so that processes on other machines see it
        try:
            yield
        except BaseException:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for folder in missing:
                    folder.rmdir()
            raise


def _open_locked(path: Path) -> IO[str]:
    """Opens and locks a file that the process holding the lock may remove."""
    while True:
        file = open(path, "a+")  # noqa: SIM115 (closed by the caller)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{path.parent}: is in use by {owner}; wait for it, or give another run_dir") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the file was removed after it was opened
