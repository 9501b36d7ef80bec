"""One file → documents: plain text, JSONL, CSV, parquet and CoNLL, each also compressed with gzip or zstandard.

Everything is read as a stream, except that a plain text file is one document and is held whole.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gptjax.config.run import DataConfig
from gptjax.errors import UserError, did_you_mean

ENDINGS = (".txt", ".md", ".py", ".jsonl", ".csv", ".parquet", ".conll")
COMPRESSIONS = (".gz", ".zst")
CONLL_SENTENCES = 32  # that make a document: the format does not say where one ends

_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One text and where it stands ("corpus/a.jsonl:17" or "a.txt"), for error messages."""

    text: str
    where: str


def ending(path: Path) -> str:
    """The ending that decides how `path` is read, without the compression: ".jsonl" for a.jsonl.gz."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def refuse_links_out(root: Path, paths: Iterable[Path]) -> None:
    """Refuses links that lead out of the folder that was given: an unpacked archive may hold one to anywhere.

    Raises:
        UserError: The message names the first such link.
    """
    for path in paths:
        if path.is_symlink():
            try:
                target = Path(os.path.realpath(path))
            except OSError as error:
                raise UserError(f"{path}: a link that cannot be read: {error.strerror}") from None
            if not target.is_relative_to(root):
                raise UserError(
                    f"{path}: a link that leads out of its folder, to {target};"
                    " to read it, name it in data.path itself or by a pattern"
                )


def read_file(path: Path, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Yields the documents of one file in their order.

    Args:
        path: A file whose ending is one of `ENDINGS`, with or without one of `COMPRESSIONS`.
        data: Names the text field and what to do with bytes that are no UTF-8.
        counts: Gets "invalid_utf8_skipped" and "invalid_utf8_replaced".

    Raises:
        UserError: The file cannot be read, is truncated or malformed, or a row has no text.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet, ".conll": _read_conll}
    reader = readers.get(ending(path), _read_text)
    with named_errors(path), open_binary(path) as file:
        yield from reader(file, str(path), data, counts)


def open_binary(path: Path) -> io.BufferedReader:
    """Opens a file for reading, decompressing by its ending; the caller closes it."""
    compression = path.suffix.lower()
    file = open(path, "rb")  # noqa: SIM115
    if compression not in COMPRESSIONS:
        return file
    if path.stat().st_size == 0:
        file.close()
        raise EOFError
    if compression == ".gz":
        return io.BufferedReader(_OwningGzip(file), buffer_size=2**20)
    return io.BufferedReader(_ZstdStream(file), buffer_size=2**20)


def decode_utf8(raw: bytes, where: str, data: DataConfig, counts: Counter[str]) -> str | None:
    """Decodes by the policy `data.invalid_utf8`; None: leave the document out.

    Raises:
        UserError: Under policy "error", naming the offset of the first byte that is no UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if data.invalid_utf8 == "error":
            utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
            raise UserError(
                f"{where}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8"
                f"{' (the file looks like UTF-16)' if utf16 else ''}; convert it to UTF-8,"
                " or set data.invalid_utf8 to replace or skip"
            ) from None
        return _by_policy(raw.decode("utf-8", "replace"), data, counts)


def check_text(value: object, where: str, data: DataConfig, counts: Counter[str]) -> str | None:
    """Returns a row's text if it is a string of Unicode characters; None: leave the document out.

    Raises:
        UserError: Not a string, or half of a surrogate pair under policy "error".
    """
    if not isinstance(value, str):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{where}: field {data.text_field!r} is {found}, must be a string")
    if value.isascii() or not (lone := _SURROGATE.search(value)):
        return value
    if data.invalid_utf8 == "error":
        raise UserError(
            f"{where}: U+{ord(lone.group()):04X} at character {lone.start()} is half of a surrogate pair and has"
            " no UTF-8; mend the row, or set data.invalid_utf8 to replace or skip"
        )
    return _by_policy(_SURROGATE.sub("\ufffd", value), data, counts)


def missing_field(where: str, field: str, fields: Iterable[str]) -> UserError:
    """The error for a row or table without the text field."""
    fields = [str(name) for name in fields]
    near = did_you_mean(field, fields) or f" It has: {', '.join(map(repr, fields)) or 'no field'}."
    return UserError(f"{where}: no field {field!r}; set data.text_field to the one that holds the text.{near}")


def _by_policy(replaced: str, data: DataConfig, counts: Counter[str]) -> str | None:
    if data.invalid_utf8 == "skip":
        counts["invalid_utf8_skipped"] += 1
        return None
    counts["invalid_utf8_replaced"] += 1
    return replaced


def json_object(line: str, where: str, whole: bool) -> dict:
    """The object on a line of JSONL; `whole`: the line ends in a newline.

    Raises:
        UserError: It is not valid JSON, or something else than an object.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "" if whole else " (the last line has no newline: is the file truncated?)"
        raise UserError(f"{where}: not valid JSON: {error}{cut}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: a {type(values).__name__}, must be an object")
    return values


def _read_text(file: io.BufferedReader, where: str, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    text = decode_utf8(file.read(), where, data, counts)
    if text is not None:
        yield Document(text.removeprefix("\ufeff"), where)


def _read_jsonl(file: io.BufferedReader, name: str, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    for number, raw in enumerate(file, 1):
        where = f"{name}:{number}"
        line = decode_utf8(raw, where, data, counts)
        if line is None:
            continue
        line = line.removeprefix("\ufeff") if number == 1 else line
        if not line.strip():
            continue
        row = json_object(line, where, whole=raw.endswith(b"\n"))
        if data.text_field not in row:
            raise missing_field(where, data.text_field, row)
        text = check_text(row[data.text_field], where, data, counts)
        if text is not None:
            yield Document(text, where)


def _read_csv(file: io.BufferedReader, name: str, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    # surrogateescape keeps bytes that are no UTF-8 until the row is known that the policy applies to.
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        if data.text_field not in header:
            raise missing_field(f"{name}:1", data.text_field, header)
        column = header.index(data.text_field)
        for row in rows:
            where = f"{name}:{rows.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{where}: {len(row)} fields, must be {len(header)} as in the header;"
                    " a field with commas or newlines needs quotes"
                )
            text = row[column]
            if not text.isascii() and _SURROGATE.search(text):
                text = decode_utf8(text.encode("utf-8", "surrogateescape"), where, data, counts)
            if text is not None:
                yield Document(text, where)
    except csv.Error as error:
        raise UserError(f"{name}:{rows.line_num}: not valid CSV: {error} (is the file truncated?)") from None
    finally:
        lines.detach()  # else its destructor closes the file a second time


def _read_parquet(file: io.BufferedReader, name: str, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:
        # The footer stands at the end, so a compressed table has to be unpacked to seek in it.
        compressed = not isinstance(file.raw, io.FileIO)
        if compressed:
            shutil.copyfileobj(file, unpacked, 2**20)
        try:
            table = pyarrow.parquet.ParquetFile(unpacked if compressed else file)
            schema = table.schema_arrow
            if data.text_field not in schema.names:
                raise missing_field(name, data.text_field, schema.names)
            kind = schema.field(data.text_field).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{name}: column {data.text_field!r} has type {kind}, must be string")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[data.text_field]):
                # As bytes, because arrow does not check that its strings are UTF-8.
                strings = batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                for raw in strings.to_pylist():
                    number += 1
                    where = f"{name}:{number}"
                    text = _decode_cell(raw, where, data, counts)
                    if text is not None:
                        yield Document(text, where)
        except pyarrow.ArrowException as error:
            raise UserError(f"{name}: not a valid parquet file: {_one_line(error)}") from None


def _read_conll(file: io.BufferedReader, name: str, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Words without their tags: a sentence is a line, its words apart by one space."""
    sentences: list[str] = []
    where = f"{name}:1"
    for first, words in conll_sentences(file, name, data, counts):
        where = where if sentences else f"{name}:{first}"
        sentences.append(" ".join(word for word, *_ in words))
        if len(sentences) == CONLL_SENTENCES:
            yield Document("\n".join(sentences) + "\n", where)
            sentences = []
    if sentences:
        yield Document("\n".join(sentences) + "\n", where)


def conll_sentences(
    file: io.BufferedReader, name: str, data: DataConfig, counts: Counter[str]
) -> Iterator[tuple[int, list[list[str]]]]:
    """Yields sentences: the number of the first line, and a list of columns for each word.

    Sentences stand apart by blank lines, columns by tabs (or, in a line without a tab, by spaces).

    Raises:
        UserError: A line has another number of columns than the first.
    """
    rows: list[list[str]] = []
    first, columns = 1, 0
    for number, raw in enumerate(file, 1):
        line = decode_utf8(raw, f"{name}:{number}", data, counts)
        if line is None:
            continue
        line = (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")
        if not line.strip():
            if rows:
                yield first, rows
            rows = []
            continue
        cells = line.split("\t") if "\t" in line else line.split()
        columns = columns or len(cells)
        if len(cells) != columns:
            raise UserError(f"{name}:{number}: {len(cells)} columns, must be {columns} as in the first line")
        first = first if rows else number
        rows.append(cells)
    if rows:
        yield first, rows


def _decode_cell(raw: bytes | None, where: str, data: DataConfig, counts: Counter[str]) -> str | None:
    if raw is None:
        return check_text(raw, where, data, counts)
    return decode_utf8(raw, where, data, counts)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns what reading raises into one line that names the file."""
    import zstandard

    try:
        yield
    except EOFError:
        raise UserError(f"{path}: ends too early: the compressed file is truncated") from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: not a valid {path.suffix} file: {_one_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or _one_line(error)}") from None


class _OwningGzip(gzip.GzipFile):
    """A gzip reader that closes the file below it, and that has no `raw` file to seek in."""

    def __init__(self, file: io.BufferedReader):
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


class _ZstdStream(io.RawIOBase):
    """Decompresses frame after frame.

    zstandard's own stream reader takes a truncated file for a complete one; this one raises EOFError.
    """

    def __init__(self, file: io.BufferedReader):
        self._below = file
        self._frame = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer, /) -> int:
        import zstandard

        while not self._ready:
            self._compressed = self._compressed or self._below.read(2**16)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = None
        target = memoryview(buffer)
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._below.close()
        super().close()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
