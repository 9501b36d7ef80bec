"""The origin of each document of a split, in a compressed list next to the shards."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from gptjax.errors import UserError


class Origin(NamedTuple):
    """The origin of a document."""

    where: str
    """File and line, or file, as in error messages."""
    text_hash: str
    """XXH3-64 of the cleaned text, 16 hexadecimal digits."""


class OriginWriter:
    """Writes the origins of a split, in the order of its documents."""

    def __init__(self, folder: Path, split: str):
        self._file = open(origins_path(folder, split), "wb")  # noqa: SIM115
        self._stream = zstandard.ZstdCompressor(level=3).stream_writer(self._file)

    def add(self, where: str, text_hash: int) -> None:
        """Appends a document."""
        self._stream.write(json.dumps([where, f"{text_hash:016x}"]).encode() + b"\n")

    def close(self) -> None:
        """Completes the file."""
        self._stream.close()


def origins_path(folder: Path, split: str) -> Path:
    """The file of a split's origins."""
    return folder / f"{split}-documents.jsonl.zst"


def read_origins(folder: Path, split: str) -> Iterator[Origin]:
    """Yields the origin of each document of a split.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = origins_path(folder, split)
    try:
        with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
            left = b""
            while chunk := reader.read(2**20):
                *lines, left = (left + chunk).split(b"\n")
                yield from (Origin(*json.loads(line)) for line in lines)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file: the data was prepared by an earlier version; prepare it again"
        ) from None
    except (OSError, ValueError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def find_documents(folder: Path, split: str, names: Collection[str]) -> tuple[list[int], set[str]]:
    """Returns the numbers of the documents that are named by their hash or their origin, and the names that match no
    document.

    A name without a line ("a.jsonl") means every document of the file.

    Raises:
        UserError: The file of origins is missing or damaged.
    """
    wanted, found, numbers = set(names), set(), []
    for number, origin in enumerate(read_origins(folder, split)):
        given = wanted.intersection((origin.where, origin.text_hash, origin.where.rpartition(":")[0]))
        if given:
            numbers.append(number)
            found |= given
    return numbers, wanted - found


def read_skipped(folder: Path, path: str) -> tuple[frozenset[int], str]:
    """Reads `data.skip`: returns the training documents that it names, and a log line.

    Raises:
        UserError: The file cannot be read, or names a document that is in neither split.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.skip={path}: cannot be read: {error}") from None
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    numbers, missing = find_documents(folder, "train", names)
    if missing:
        in_validation, missing = find_documents(folder, "validation", missing)
        if missing:
            raise UserError(f"data.skip={path}: no document is {min(missing)!r}; gptjax data prints hashes and places")
        return frozenset(numbers), f"{len(numbers):,} training documents; {len(in_validation):,} are validation text"
    return frozenset(numbers), f"{len(numbers):,} training documents"
