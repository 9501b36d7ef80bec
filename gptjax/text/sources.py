"""Where text comes from: files, the Python standard library, Hugging Face datasets → documents, as a stream."""

import glob
import itertools
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from gptjax.config.run import DataConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.text import hub
from gptjax.text.formats import COMPRESSIONS, ENDINGS, Document, ending, read_file, refuse_links_out

_NOT_STDLIB = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data"),  # tables of characters and of help texts: a quarter of the bytes, and no code
}


def read_documents(data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Yields the whole corpus in an order that depends on the sources alone.

    Args:
        data: Exactly one of path, source and hf_dataset is set.
        counts: Gets "read" (documents yielded), "unknown_files", "invalid_utf8_skipped" and
            "invalid_utf8_replaced".

    Raises:
        UserError: Nothing is there to read, or something cannot be read; the message names file and row.
    """
    documents = itertools.chain.from_iterable(_readers(data, counts))
    for document in itertools.islice(documents, data.max_documents or None):
        counts["read"] += 1
        yield document


def find_files(paths: Sequence[str], counts: Counter[str]) -> list[Path]:
    """Resolves files, folders (with what is below them) and globs to a sorted list, each file once.

    Hidden files and folders inside folders are passed over. Files inside folders and from globs that have
    another ending than those in `ENDINGS` are counted as "unknown_files"; a file that is named must have one.

    Raises:
        UserError: A path does not exist, is of no known kind, or no file is found.
    """
    found: dict[tuple[int, int], Path] = {}
    for given in paths:
        path = Path(given).expanduser()
        if os.path.exists(path):
            named, matches = True, [path]
        else:
            named, matches = False, [Path(match) for match in glob.glob(str(path), recursive=True)]
            if not matches:
                near = did_you_mean(path.name, _names_in(path.parent))
                raise UserError(f"data.path: {given}: no such file or folder, and no match as a pattern.{near}")
        for match in matches:
            for file in _files_below(match) if match.is_dir() else [match]:
                if ending(file) in ENDINGS and file.is_file():
                    stat = file.stat()
                    found.setdefault((stat.st_dev, stat.st_ino), file)
                elif named and file == path:
                    raise UserError(
                        f"data.path: {given}: ending {file.suffix!r} is not one of {' '.join(ENDINGS)},"
                        f" each also {' or '.join(COMPRESSIONS)}.{did_you_mean(ending(file), ENDINGS)}"
                    )
                else:
                    counts["unknown_files"] += 1
    if not found:
        raise UserError(
            f"data.path: {', '.join(paths)}: no file ends in one of {' '.join(ENDINGS)}"
            f" ({counts['unknown_files']} other files are there)"
        )
    return sorted(found.values(), key=lambda path: path.parts)


def source_fingerprint(data: DataConfig) -> str:
    """Identifies the sources cheaply, without reading text: 32 hexadecimal digits.

    Files count by path, size and modification time, the standard library by Python's version and its files'
    sizes, a dataset by its name and (unless streamed) the datasets library's own fingerprint.

    Raises:
        UserError: Nothing is there to read.
    """
    if data.source:
        root = _stdlib()
        sizes = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in _stdlib_files()]
        identity = [data.source, platform.python_version(), sizes]
    elif data.hf_dataset:
        identity = ["hf_dataset", data.hf_dataset, "streamed" if data.streaming else hub.fingerprint(data)]
    else:
        stats = [(os.path.abspath(path), path.stat()) for path in _given_files(data, Counter())]
        identity = ["path", [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    return xxhash.xxh3_128_hexdigest(json.dumps(identity).encode("utf-8", "surrogateescape"))


def _readers(data: DataConfig, counts: Counter[str]) -> Iterator[Iterator[Document]]:
    if data.hf_dataset:
        yield hub.read_dataset(data, counts)
    elif data.source:
        for path in _stdlib_files():
            yield _read_stdlib_file(path, counts)
    else:
        for path in _given_files(data, counts):
            yield read_file(path, data, counts)


def _given_files(data: DataConfig, counts: Counter[str]) -> list[Path]:
    if not data.path:
        raise UserError("no text: set one of data.path, data.source and data.hf_dataset")
    return find_files(data.path, counts)


def _files_below(folder: Path) -> Iterator[Path]:
    seen, root = set(), Path(os.path.realpath(folder))
    for parent, folders, names in os.walk(folder, onerror=_cannot_list, followlinks=True):
        identity = os.path.realpath(parent)
        if identity in seen:  # a link to a folder above: it would never end
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        refuse_links_out(root, (*files, *(Path(parent, name) for name in folders)))
        yield from files


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files() -> list[Path]:
    """The standard library's modules: no tests, no tables, no installed packages."""
    found = []
    for parent, folders, names in os.walk(_stdlib()):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        found += [Path(parent, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(f"data.source=python-stdlib: no *.py below {_stdlib()}; set data.path instead")
    return sorted(found, key=lambda path: path.parts)


def _read_stdlib_file(path: Path, counts: Counter[str]) -> Iterator[Document]:
    # A few modules of some Pythons are in other encodings, whatever the user's policy for their own text.
    return read_file(path, DataConfig(invalid_utf8="skip"), counts)
