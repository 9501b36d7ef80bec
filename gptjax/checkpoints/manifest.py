"""The manifest of a checkpoint: sizes and checksums of all files, written last, so that damage is found before use.

A folder without a manifest is a checkpoint that was never finished. The checksums are XXH3-128: they detect errors of
disks, memory and networks, not manipulation by an attacker.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from gptjax import __version__
from gptjax.checkpoints.direct import read_direct
from gptjax.errors import UserError
from gptjax.files import sync, write_atomic

MANIFEST = "manifest.json"
FORMAT = "gptjax-checkpoint"
FORMAT_VERSION = 1
_PIECE = 2**22


class DamagedError(Exception):
    """A checkpoint is damaged; the message is the reason, in a few words."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint's manifest."""

    step: int
    val_loss: float | None
    """Validation loss of the step; None: not evaluated."""
    meta: dict[str, Any]
    """JSON-compatible metadata: the state of the training loop, the data's hash, scores."""
    files: dict[str, tuple[int, str]]
    """Size in bytes and XXH3-128 of every file, by its path in the folder."""

    @property
    def scores(self) -> dict[str, float]:
        """Scores of this step's evaluation, by their names in `metrics.jsonl`; empty: unknown."""
        return self.meta.get("evaluation", {}).get("scores", {})

    @property
    def measured_on(self) -> str:
        """Identity of the validation data of that evaluation; empty: unknown."""
        return self.meta.get("evaluation", {}).get("measured_on", "")


def write_manifest(folder: Path, step: int, val_loss: float | None, meta: dict[str, Any]) -> None:
    """Syncs all files below `folder`, computes their checksums, and writes the manifest into `folder`."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _checksum(read_direct(path))]
    for inside in [*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent]:
        sync(inside)
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "gptjax": __version__,
        "step": step,
        "val_loss": val_loss,
        "meta": meta,
        "files": files,
    }
    _write(folder, content)


def add_evaluation(folder: Path, val_loss: float, meta: dict[str, Any]) -> None:
    """Replaces validation loss and metadata of a manifest, for an evaluation that came after the checkpoint."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del content["checksum"]
    _write(folder, content | {"val_loss": val_loss, "meta": meta})


def _write(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content | {"checksum": _content_checksum(content)}, indent=1)
    write_atomic(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint without checking the files that it lists.

    Raises:
        DamagedError: The manifest is missing or damaged.
        UserError: A newer gptjax wrote it.
    """
    if not folder.is_dir():
        raise DamagedError("is not a folder")
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(f"has no {MANIFEST}, so it was never finished")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DamagedError(f"{MANIFEST} is not that of a checkpoint")
        _check_version(folder, content)
        checksum = content.pop("checksum")
        if checksum != _content_checksum(content):
            raise DamagedError(f"{MANIFEST} does not match its own checksum")
        files = {_inside(name): (int(size), str(checksum)) for name, (size, checksum) in content["files"].items()}
        return Manifest(int(content["step"]), content["val_loss"], dict(content["meta"]), files)
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{MANIFEST} is damaged") from None


def verify(folder: Path) -> Manifest:
    """Reads a checkpoint's manifest and verifies the checksum of every file.

    Raises:
        DamagedError: A file is missing or damaged.
        UserError: A newer gptjax wrote the checkpoint.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    for name, (_, checksum) in manifest.files.items():
        try:
            actual = _checksum(_read_cached(folder / name))
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
        if actual != checksum:
            raise DamagedError(f"{name} does not match its checksum in {MANIFEST}")
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Checks that every file of the manifest exists and has the right size.

    Raises:
        DamagedError: A file is missing or has another size.
    """
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{name} has {path.stat().st_size:,} bytes, must have {size:,}")


def _check_version(folder: Path, content: dict[str, Any]) -> None:
    if int(content["version"]) > FORMAT_VERSION:
        raise UserError(
            f"{folder}: written by gptjax {content['gptjax']} in format {content['version']}; this is gptjax"
            f" {__version__}, which reads up to format {FORMAT_VERSION}; use the newer one"
        )


def _inside(name: str) -> str:
    """Returns a relative path of the manifest after checking that it stays in its folder."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
        raise DamagedError(f"{MANIFEST} names {name!r}, which lies outside the checkpoint")
    return name


def _content_checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _checksum(pieces: Iterable[bytes | memoryview]) -> str:
    checksum = xxhash.xxh3_128()
    for piece in pieces:
        checksum.update(piece)
    return checksum.hexdigest()


def _read_cached(path: Path) -> Iterator[bytes]:
    """Yields a file's bytes in pieces, through the page cache, so that loading the arrays next is fast."""
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            yield piece
