"""Streams documents from files, the Python standard library, or a Hugging Face dataset."""

import functools
import itertools
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from gptjax.config.data import DataConfig
from gptjax.errors import UserError
from gptjax.text import hub
from gptjax.text.cleaning.extra import MissingLibrary, version
from gptjax.text.counts import UNREADABLE
from gptjax.text.formats import ENDINGS, HTML_ENDINGS, NAMED_ENDINGS, Document, decode_utf8, ending, read_file
from gptjax.text.git import PREFIX, Repository, find_repositories, read_repository
from gptjax.text.paths import find_files
from gptjax.text.remote import File, file_identity, file_size

_NOT_STDLIB = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data"),  # tables of characters and help texts, no code: a quarter of the bytes
}
_LIBRARIES = {".xml": "mwparserfromhell", ".pdf": "pypdf", ".epub": "selectolax"}
"""Libraries that extract text from each kind of file. Their versions are part of the fingerprint."""


def read_documents(data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Yields the whole corpus, in an order that depends only on the sources.

    Args:
        data: Exactly one of path, source and hf_dataset is set.
        counts: Incremented at "read" (documents yielded), "unknown_files", "invalid_utf8_skipped",
            "invalid_utf8_replaced", and counts of single file formats.

    Raises:
        UserError: There is nothing to read, or something cannot be read; the message names file and row.
    """
    documents = itertools.chain.from_iterable(_readers(data, counts))
    for document in itertools.islice(documents, data.max_documents or None):
        counts["read"] += 1
        yield document


def source_fingerprint(data: DataConfig) -> str:
    """Identifies the sources without reading text: 32 hexadecimal digits.

    Files are identified by path, size and modification time; the standard library by Python's version and its files'
    sizes; a dataset by its name and (unless streamed) the datasets library's own fingerprint.

    Raises:
        UserError: There is nothing to read.
    """
    if data.source:
        root = _stdlib()
        sizes = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in _stdlib_files()]
        identity = [data.source, platform.python_version(), sizes]
    elif data.hf_dataset:
        identity = ["hf_dataset", data.hf_dataset, "streamed" if data.streaming else hub.fingerprint(data)]
    else:
        files = given_files(data, Counter())
        identity = ["path", [file_identity(file) for file in files]]
        used = {_LIBRARIES[kind] for file in files if (kind := ending(file)) in _LIBRARIES}
        if used:
            identity.append([(name, version(name)) for name in sorted(used)])
        if repositories := find_repositories(data.path):
            identity.append([one.commit for one in repositories])
    return xxhash.xxh3_128_hexdigest(json.dumps(identity).encode("utf-8", "surrogateescape"))


def _readers(data: DataConfig, counts: Counter[str]) -> Iterator[Iterator[Document]]:
    if data.hf_dataset:
        yield hub.read_dataset(data, counts)
    elif data.source:
        for path in _stdlib_files():
            yield _read_stdlib_file(path, counts)
    else:
        for path in given_files(data, counts):
            yield _or_skipped(read_file(path, data, counts), data, counts)
        for repository in find_repositories(data.path):
            yield _or_skipped(_read_repository(repository, data, counts), data, counts)


def _or_skipped(documents: Iterator[Document], data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Yields documents; by policy `data.unreadable_files`, an error ends them, and is counted and named."""
    try:
        yield from documents
    except MissingLibrary:
        raise
    except UserError as error:
        if data.unreadable_files == "error":
            raise
        counts["unreadable_files"] += 1
        counts[f"{UNREADABLE}{error}"] += 1


def _read_repository(repository: Repository, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    decode = functools.partial(decode_utf8, data=data, counts=counts)
    found = read_repository(repository, data.git_endings, decode, counts)
    yield from (Document(text, where) for text, where in found)


def corpus_bytes(paths: Sequence[str]) -> int:
    """Total size in bytes of the files in `data.path`; compressed files count with their compressed size.

    Raises:
        UserError: A path does not exist, or no file is found.
    """
    return sum(map(file_size, given_files(DataConfig(path=tuple(paths)), Counter())))


def given_files(data: DataConfig, counts: Counter[str]) -> list[File]:
    """The files of `data.path` in reading order, without those of git repositories; `counts` is incremented for files
    of other kinds.
    """
    if not data.path:
        raise UserError("no text: set one of data.path, data.source and data.hf_dataset")
    endings = (ENDINGS if data.clean.html == "keep" else ENDINGS + HTML_ENDINGS) + NAMED_ENDINGS
    paths = [path for path in data.path if not path.startswith(PREFIX)]
    return sorted(find_files(paths, "data.path", endings, counts) if paths else [], key=lambda path: path.parts)


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _stdlib_files() -> list[Path]:
    """The standard library's modules, without tests, tables and installed packages."""
    found = []
    for parent, folders, names in os.walk(_stdlib()):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        found += [Path(parent, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(f"data.source=python-stdlib: no *.py below {_stdlib()}; set data.path instead")
    return sorted(found, key=lambda path: path.parts)


def _read_stdlib_file(path: Path, counts: Counter[str]) -> Iterator[Document]:
    # Some Python versions have a few modules in other encodings; `data.invalid_utf8` does not apply to them.
    return read_file(path, DataConfig(invalid_utf8="skip"), counts)
