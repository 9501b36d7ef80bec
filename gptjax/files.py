"""Writing files so that what has a final name is complete."""

import contextlib
import os
from pathlib import Path


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `content` under a temporary name in the same folder, syncs it and renames it to `path`."""
    temporary = temporary_name(path)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def temporary_name(path: Path) -> Path:
    """The name that `path` has until it is complete: hidden, and another for each process."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def publish(temporary: Path, path: Path) -> None:
    """Renames a synced file or folder and syncs the folder that holds it."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def forget(folder: Path) -> None:
    """Gives back the memory in which the system keeps copies of synced files below a folder, where it can be asked to.

    What is written next then finds memory at hand. On a virtual machine memory that has lain free for long is slow to
    come by: its host has taken it back.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it is only advice
            if path.is_file():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
