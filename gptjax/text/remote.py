"""Files behind an address that the fsspec library opens: s3://, gs://, hf://, memory:// and so on.

Credentials come from the environment or from fsspec's own configuration, never from an address: `redact` removes them
from what a library says in an error.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gptjax.errors import UserError

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://")
_SECRET_NAME = re.compile(r"key|secret|token|passw|credential|signature", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@|\?[^\s'\"]*=[^\s'\"]*")
_SHORTEST_SECRET = 4


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file at an address, with the methods of `Path` that readers use."""

    address: str
    size: int
    """Bytes."""
    version: str
    """Version of the file: it changes if the file changes."""

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self.address).name

    @property
    def suffix(self) -> str:
        """The ending of the name."""
        return PurePosixPath(self.address).suffix

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the address, by which files are sorted."""
        return tuple(self.address.split("/"))

    def open(self) -> Any:
        """Opens the file to read bytes; the caller closes it."""
        system, path = _file_system(self.address)
        return system.open(path, "rb")


File = Path | RemoteFile


def is_address(path: str) -> bool:
    """Whether a path is an address such as s3://bucket/a.jsonl."""
    return _ADDRESS.match(path) is not None


def file_size(file: File) -> int:
    """Bytes of a file."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def file_identity(file: File) -> tuple[str, int, int | str]:
    """Name, size and version of a file, without reading it."""
    if isinstance(file, RemoteFile):
        return file.address, file.size, file.version
    stat = file.stat()
    return os.path.abspath(file), stat.st_size, stat.st_mtime_ns


def find_remote(address: str, option: str) -> Iterator[RemoteFile]:
    """Yields the files of an address: a file, all files below a folder, or the matches of a pattern.

    Hidden files in folders or among the matches are ignored.

    Raises:
        UserError: There is no such file, or the folder cannot be listed.
    """
    if address.startswith(("file:", "local:")):
        raise UserError(f"{option}: {address}: is on this machine; give the path without the address")
    try:
        system, path = _file_system(address)
        if any(character in path for character in "*?["):
            found = {name: one for name, one in system.glob(path, detail=True).items() if not _hidden(name, "/")}
        else:
            about = system.info(path)
            below = about["type"] == "directory"
            found = system.find(path, detail=True) if below else {path: about}
            found = {name: one for name, one in found.items() if not below or not _hidden(name, path)}
        files = [
            RemoteFile(system.unstrip_protocol(name), int(one["size"]), str(system.ukey(name)))
            for name, one in sorted(found.items())
            if one["type"] == "file"
        ]
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    except FileNotFoundError:
        files = []
    except Exception as error:  # every file system has its own
        raise UserError(f"{option}: {address}: cannot be listed: {redact(error)}") from None
    if not files:
        raise UserError(f"{option}: {address}: no such file or folder, and no match as a pattern")
    yield from files


def redact(error: BaseException | str) -> str:
    """The message of an error on one line, without secrets of the environment or of fsspec's configuration."""
    text = " ".join(str(error).split()) or type(error).__name__
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _IN_ADDRESS.sub("***", text)


def _secrets() -> set[str]:
    from fsspec.config import conf

    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    found |= set(_secrets_in(conf))
    return {value for value in found if len(value) >= _SHORTEST_SECRET}


def _secrets_in(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _secrets_in(value)
        elif isinstance(value, str) and _SECRET_NAME.search(name):
            yield value


def _file_system(address: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{address}: needs the library fsspec: pip install 'gptjax[fsspec]'") from None
    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:  # the protocol's library is missing, or the protocol is unknown
        raise UserError(f"{address}: {redact(error)}") from None


def _hidden(path: str, folder: str) -> bool:
    return any(part.startswith(".") for part in path.removeprefix(folder).split("/"))
