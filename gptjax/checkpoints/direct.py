"""Files written and read past the page cache.

The kernel's copy of a checkpoint into the page cache, and from there to the disk, takes seconds of the processor that
trains beside it (docs/reliability.md has figures). Where the platform or the file system has no direct access, the page
cache is used.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_PIECE = 2**22
"""Bytes at a time."""
_UNIT = 4096
"""Direct access starts and ends at multiples of a disk's block, in the file and in memory."""
_DIRECT = getattr(os, "O_DIRECT", 0)


def write_direct(path: Path, content: np.ndarray) -> None:
    """Writes an array's bytes, in C order, to a new file. It is on the disk only after a sync.

    Raises:
        OSError: There is such a file, or the disk is full.
    """
    bytes_N = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
    file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        buffer = _aligned(len(bytes_N))
        for start in range(0, len(bytes_N), _PIECE):
            piece = bytes_N[start : start + _PIECE]
            np.copyto(np.frombuffer(buffer, np.uint8, len(piece)), piece)
            if len(piece) % _UNIT:
                _use_cache(file)
            _write(file, buffer[: len(piece)])
    finally:
        os.close(file)


def read_direct(path: Path) -> Iterator[memoryview]:
    """Yields a file's bytes in pieces, as the disk has them. Each is overwritten by the next.

    Raises:
        OSError: The file cannot be read.
    """
    file = _open(path, os.O_RDONLY)
    try:
        buffer = _aligned(os.fstat(file).st_size)
        while count := _read(file, buffer):
            yield buffer[:count]
    finally:
        os.close(file)


def _aligned(size: int) -> memoryview:
    """Memory for pieces of `size` bytes, which starts with a page."""
    units = -(-min(max(size, 1), _PIECE) // _UNIT)
    return memoryview(mmap.mmap(-1, units * _UNIT))


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL or not _DIRECT:
            raise
    # Such a file system may have made the file before it refused.
    return os.open(path, flags & ~os.O_EXCL, 0o666)


def _use_cache(file: int) -> None:
    if _DIRECT:
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT)


def _write(file: int, piece: memoryview) -> None:
    while piece:
        try:
            piece = piece[os.write(file, piece) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _is_direct(file):
                raise
            _use_cache(file)


def _read(file: int, buffer: memoryview) -> int:
    try:
        return os.readv(file, [buffer])
    except OSError as error:
        if error.errno != errno.EINVAL or not _is_direct(file):
            raise
    _use_cache(file)
    return os.readv(file, [buffer])


def _is_direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & _DIRECT)
