"""Writes and reads files without the page cache (O_DIRECT).

Copying a checkpoint through the page cache takes seconds of CPU time from training (docs/reliability.md has figures).
If the platform or the file system does not support direct access, the page cache is used.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_PIECE = 2**22
"""Bytes of one read or write."""
_UNIT = 4096
"""Direct access requires offsets, lengths and addresses that are multiples of a disk block."""
_DIRECT = getattr(os, "O_DIRECT", 0)


def write_direct(path: Path, content: np.ndarray) -> None:
    """Writes an array's bytes, in C order, to a new file. The data are durable only after a sync.

    Raises:
        OSError: The file exists, or the disk is full.
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
    """Yields a file's bytes in pieces, read from the disk itself. Each piece overwrites the previous one.

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
    """Allocates page-aligned memory for pieces of a file of `size` bytes."""
    units = -(-min(max(size, 1), _PIECE) // _UNIT)
    return memoryview(mmap.mmap(-1, units * _UNIT))


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL or not _DIRECT:
            raise
    # A file system without direct access may have created the file before it returned the error.
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
