"""Writing files so that what has a final name is complete."""

import contextlib
import functools
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from gptjax.errors import UserError


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` under a temporary name in the same folder, syncs it and renames it to `path`.

    Raises:
        OSError: It cannot be written; the error names `path`.
    """
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def atomic_file(path: Path, mode: Literal["w", "wb"] = "wb") -> Iterator[IO[Any]]:
    """Yields a file with a temporary name in the same folder. At the end it is synced and renamed to `path`, or, after
    an error, deleted.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, mode, encoding="utf-8" if mode == "w" else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporary_name(path: Path) -> Path:
    """The name that `path` has until it is complete: hidden, and another for each process on every host.

    Containers on different hosts may share a folder, and often have the same process number and host name.

    Raises:
        UserError: `path` is "." or "/", which no file can be named.
    """
    if not path.name:
        raise UserError(f"{path}: is a folder; name a file")
    return path.with_name(f".{path.name}.tmp-{_process_token(os.getpid())}")


@functools.cache
def _process_token(pid: int) -> str:
    host = "".join(character if character.isalnum() else "-" for character in socket.gethostname()[:32])
    return f"{host}-{pid}-{secrets.token_hex(4)}"


def check_writable(option: str, path: Path) -> None:
    """Checks that a file can be written to `path`, before the work whose result it holds.

    Raises:
        UserError: It is a folder, or its folder does not exist or cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"{option}={path}: is a folder; name a file")
    temporary = temporary_name(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"{option}={path}: cannot be written: {error.strerror}; name another file") from None


def publish(temporary: Path, path: Path) -> None:
    """Renames a synced file or folder and syncs the folder that holds it."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Puts a file's content, or the names in a folder, on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
