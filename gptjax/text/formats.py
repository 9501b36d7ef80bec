"""One file → its rows, or its documents: plain text, JSONL, CSV, TSV, parquet and CoNLL, each also compressed.

Pretraining reads documents and the other tasks read rows, both through the readers of this module. Rows are read as a
stream; a plain text file is one document and is held whole.
"""

import codecs
import contextlib
import csv
import functools
import io
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config.data import TEMPLATE_FIELD, DataConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.text.arrow import cells_of, is_text
from gptjax.text.books import read_epub, read_pdf
from gptjax.text.collect import read_mbox, read_warc
from gptjax.text.conll import Sentence, conll_sentences, sentence_documents, sentence_row
from gptjax.text.remote import File
from gptjax.text.streams import COMPRESSIONS, named_errors, one_line_of, open_binary
from gptjax.text.unicode import UTF16_HINT, InvalidText, find_surrogate, has_surrogate, replace_invalid
from gptjax.text.wiki import read_mediawiki

TEXT_ENDINGS = (".txt", ".md", ".py")
ROW_ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet", ".conll", ".conllu")
HTML_ENDINGS = (".html", ".htm", ".xhtml")
"""Read where `data.clean.html` makes text of them."""
COLLECTIONS = (".mbox", ".warc", ".wet")
ENDINGS = TEXT_ENDINGS + ROW_ENDINGS + COLLECTIONS
BOOKS = {".epub": read_epub, ".pdf": read_pdf}
NAMED_ENDINGS = (".xml", *BOOKS)
"""Endings of files that are read only if a path or a pattern names them, not inside folders."""

Columns = Sequence[str] | None
"""The fields of a row that are read and checked; None: all."""


class Document(NamedTuple):
    """One text and where it stands ("corpus/a.jsonl:17" or "a.txt"), for error messages."""

    text: str
    where: str


def batch_documents(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Yields lists of consecutive documents, each ended by the document that makes it at least so long."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Row(NamedTuple):
    """The named values of one row and where it stands ("a.jsonl:17")."""

    values: dict[str, Any]
    where: str


def ending(path: File) -> str:
    """The ending that decides how `path` is read, without the compression: ".jsonl" for a.jsonl.gz."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def read_file(path: File, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Yields the documents of one file in their order.

    Args:
        path: A file whose ending is one of `ENDINGS` or `NAMED_ENDINGS`, with or without one of `COMPRESSIONS`.
        data: The encoding, the field that holds the text, and what to do with bytes that are not valid.
        counts: Gets "invalid_utf8_skipped" and "invalid_utf8_replaced".

    Raises:
        UserError: The file cannot be read, is truncated or malformed, or a row has no text.
    """
    if ending(path) in TEXT_ENDINGS + HTML_ENDINGS:
        with named_errors(path), open_binary(path, data.encoding) as file:
            text = decode_utf8(file.read(), str(path), data, counts)
        if text is not None:
            yield Document(text.removeprefix("\ufeff"), str(path))
    elif ending(path) in COLLECTIONS:
        with named_errors(path), open_binary(path) as file:

            def decode(raw: bytes, where: str) -> str | None:
                return decode_utf8(raw, where, data, counts)

            name, is_mail = str(path), ending(path) == ".mbox"
            found = read_mbox(file, name, decode) if is_mail else read_warc(file, name, decode, counts)
            yield from (Document(text, where) for text, where in found)
    elif ending(path) == ".xml":
        with named_errors(path), open_binary(path) as file:
            yield from (Document(text, where) for text, where in read_mediawiki(file, str(path), counts))
    elif ending(path) in BOOKS:
        with named_errors(path), open_binary(path) as file, _seekable(file) as book:
            yield Document(BOOKS[ending(path)](book, str(path)), str(path))
    elif ending(path) in CONLL_ENDINGS:
        yield from (Document(text, where) for text, where in sentence_documents(_sentences(path, data, counts)))
    elif reads_whole_rows(data):
        for row in read_file_rows(path, data, counts):
            yield Document(row_text(row, data), row.where)
    else:
        for row in read_file_rows(path, data, counts, (data.text_field,)):
            yield Document(text_value(row.values[data.text_field], row.where, data.text_field), row.where)


def read_file_rows(
    path: File, data: DataConfig, counts: Counter[str], columns: Columns = None, names: Sequence[str] = ()
) -> Iterator[Row]:
    """Yields the rows of one file in their order.

    A sentence of CoNLL is a row with the fields "tokens" and "tags", see `conll.sentence_row`.

    Args:
        path: A file whose ending is one of `ROW_ENDINGS`, with or without one of `COMPRESSIONS`.
        data: The encoding, the quoting, and what to do with bytes that are not valid.
        counts: As for `read_file`.
        columns: The fields that every row must have; the others may be left out of it.
        names: Columns of a CSV or TSV file whose first line has not the first of these names, so that it is a row.

    Raises:
        UserError: The file cannot be read, is truncated or malformed, or has two fields of one name.
    """
    if ending(path) in CONLL_ENDINGS:
        yield from (Row(sentence_row(sentence), sentence.where) for sentence in _sentences(path, data, counts))
        return
    table = functools.partial(_table, names=names)
    reader: Reader = {".jsonl": _jsonl, ".parquet": _parquet}.get(ending(path), table)
    encoding = "utf-8" if ending(path) == ".parquet" else data.encoding
    policy = InvalidText(data, counts)
    with named_errors(path), open_binary(path, encoding) as file:
        yield from reader(file, str(path), data, policy, columns)


def decode_utf8(raw: bytes, where: str, data: DataConfig, counts: Counter[str]) -> str | None:
    """Decodes by the policy `data.invalid_utf8`; None: leave the document out.

    Raises:
        UserError: Under policy "error", naming the offset of the first byte that is no UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return InvalidText(data, counts).text(raw.decode("utf-8", "surrogateescape"), where)


def text_value(value: object, where: str, field: str) -> str:
    """Returns a field's value if it is a string.

    Raises:
        UserError: It is null or something else.
    """
    if not isinstance(value, str):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{where}: field {field!r} is {found}, must be a string")
    return value


def reads_whole_rows(data: DataConfig) -> bool:
    """Whether a document is made of more than one field, or of a field inside another one."""
    return bool(data.template) or "." in data.text_field


def row_text(row: Row, data: DataConfig) -> str:
    """The text of a row by `data.template` or by `data.text_field`, which names a field inside others with dots.

    Raises:
        UserError: A field is missing, null, or no text.
    """
    if data.template:
        return fill_template(data.template, row)
    field = data.text_field
    found = row.values[field] if field in row.values else _inner_field(row, field, "data.text_field")
    return text_value(found, row.where, field)


def fill_template(template: str, row: Row) -> str:
    """Puts the fields of a row into `data.template`; numbers are written as JSON writes them.

    Raises:
        UserError: A field is missing, null, or holds other fields or a list.
    """

    def value(match: re.Match[str]) -> str:
        found = _inner_field(row, match[1], "data.template")
        number = isinstance(found, (int, float))
        return json.dumps(found) if number else text_value(found, row.where, match[1])

    return TEMPLATE_FIELD.sub(value, template)


def _inner_field(row: Row, field: str, option: str) -> Any:
    """The value of "a.b": field b of the values in field a."""
    found: Any = row.values
    for name in field.split("."):
        if not isinstance(found, dict) or name not in found:
            raise missing_field(row.where, field, option, row.values)
        found = found[name]
    return found


def missing_field(where: str, field: str, option: str, fields: Iterable[str]) -> UserError:
    """The error for a row or table without a field; `option` is the option that gives the field's name."""
    fields = [str(name) for name in fields]
    near = did_you_mean(field, fields)
    if f'"{field}"' in fields:
        near = " Are its fields in quotes? Then set data.quoting=double."
    elif len(fields) == 1 and field in re.split(r"[;|,\t]", fields[0]):
        near = " Fields of .csv are separated by commas, those of .tsv by tabs: rename or convert the file."
    return UserError(
        f"{where}: no field {field!r} ({option}); it has {', '.join(map(repr, fields)) or 'no field'}.{near}"
    )


def without_surrogates(values: dict[str, Any], where: str, policy: InvalidText, columns: Columns = None) -> dict | None:
    """Returns a row's values with the policy applied to halves of surrogate pairs; None: leave the row out.

    Raises:
        UserError: There is one, under policy "error".
    """
    for field in values if columns is None else columns:
        if (found := find_surrogate([field, values[field]])) is not None:
            return replace_invalid(values) if policy.accepts_surrogate(*found, where) else None
    return values


CONLL_ENDINGS = (".conll", ".conllu")
Reader = Callable[[io.BufferedReader, str, DataConfig, InvalidText, Columns], Iterator[Row]]


class _DuplicateKey(Exception):
    """A JSON object names a key twice."""


def _sentences(path: File, data: DataConfig, counts: Counter[str]) -> Iterator[Sentence]:
    with named_errors(path), open_binary(path, data.encoding) as file, _lines(file, str(path)) as lines:
        yield from conll_sentences(lines, str(path), InvalidText(data, counts), ending(path) == ".conllu")


@contextlib.contextmanager
def _lines(file: io.BufferedReader, name: str) -> Iterator[Iterable[str]]:
    """Yields the lines of a file, which end in LF, CR LF or a lone CR, without a byte order mark.

    Bytes that are no UTF-8 become lone surrogates ("surrogateescape") until it is known which row they belong to.

    Raises:
        UserError: The file begins as UTF-16 does, so that no line could be told from the next.
    """
    if (mark := file.peek(2)[:2]) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{name}:1: byte 0x{mark[0]:02x} at offset 0 is not UTF-8 {UTF16_HINT}")
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield lines
    finally:
        lines.detach()  # else its destructor closes the file a second time


def _jsonl(
    file: io.BufferedReader, name: str, _data: DataConfig, policy: InvalidText, columns: Columns
) -> Iterator[Row]:
    with _lines(file, name) as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{name}:{number}"
            line = policy.text(raw, where) if has_surrogate(raw) else raw
            if line is None or not line.strip():
                continue
            values = _json_object(line, where)
            for field in columns or ():
                if field not in values:
                    raise missing_field(where, field, "data.text_field", values)
            if "\\u" in line:  # an escape can spell half of a surrogate pair
                values = without_surrogates(values, where, policy, columns)
            if values is not None:
                yield Row(values, where)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line, object_pairs_hook=_unique_keys)
    except _DuplicateKey as error:
        raise UserError(f"{where}: key {error} is there twice; leave one of the two out") from None
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(("\n", "\r")) else " (the last line has no newline: is the file truncated?)"
        raise UserError(f"{where}: not valid JSON: {error}{cut}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: a {type(values).__name__}, must be an object")
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _DuplicateKey(repr(_first_duplicate([key for key, _ in pairs])))
    return values


def _first_duplicate(names: Sequence[str]) -> str | None:
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


def _check_columns(names: Sequence[str], where: str, columns: Columns) -> None:
    """Checks that a table has no two columns of one name, and that it has the required ones."""
    if (twice := _first_duplicate(names)) is not None:
        places = " and ".join(str(place) for place, name in enumerate(names, 1) if name == twice)
        raise UserError(f"{where}: column {twice!r} is there twice (columns {places}); rename one of the two")
    for column in columns or ():
        if column not in names:
            raise missing_field(where, column, "data.text_field", names)


def _table(
    file: io.BufferedReader,
    name: str,
    data: DataConfig,
    policy: InvalidText,
    columns: Columns,
    *,
    names: Sequence[str] = (),
) -> Iterator[Row]:
    header = None
    for where, cells in _table_cells(file, name, data):
        blank = len(cells) == 1 and not cells[0].strip() and (header is None or len(header) > 1)
        if blank or not cells:
            continue
        if header is None and names and names[0] not in cells:
            header = list(names)
        if header is None:
            if data.invalid_utf8 == "error":
                _valid_cells(dict(enumerate(cells)), where, policy)
            header = [replace_invalid(cell) or f"column_{place}" for place, cell in enumerate(cells, 1)]
            _check_columns(header, where, columns)
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{where}: {len(cells)} fields, must be {len(header)} as in the header; a field with commas or"
                " newlines needs quotes (data.quoting)"
            )
        values = dict(zip(header, cells, strict=True))
        if columns is not None:
            values = {column: values[column] for column in columns}
        if not all(map(str.isascii, values.values())):
            values = _valid_cells(values, where, policy)
        if values is not None:
            yield Row(values, where)
    if header is None and columns:
        raise missing_field(f"{name}:1", columns[0], "data.text_field", ())


def _table_cells(file: io.BufferedReader, name: str, data: DataConfig) -> Iterator[tuple[str, list[str]]]:
    """Yields where each row of CSV or TSV begins, and its cells; none for a blank line."""
    tabs = ending(Path(name)) == ".tsv"
    quoted = data.quoting == "double" or (data.quoting == "format" and not tabs)
    csv.field_size_limit(sys.maxsize)
    with _lines(file, name) as lines:
        rows = csv.reader(
            lines,
            strict=True,
            delimiter="\t" if tabs else ",",
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        first = 1
        try:
            for cells in rows:
                yield f"{name}:{first}", cells
                first = rows.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{name}:{first}: not valid CSV: {error} (a quote that is never closed, or a truncated file;"
                " data.quoting=none takes quotes as they are)"
            ) from None


def _valid_cells(values: dict[Any, str], where: str, policy: InvalidText) -> dict[Any, Any] | None:
    valid = {name: policy.text(cell, where) if has_surrogate(cell) else cell for name, cell in values.items()}
    return None if None in valid.values() else valid


def _parquet(
    file: io.BufferedReader, name: str, _data: DataConfig, policy: InvalidText, columns: Columns
) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with _seekable(file) as whole:  # the footer stands at the end
        try:
            table = pyarrow.parquet.ParquetFile(whole)
            schema = table.schema_arrow
            _check_columns(schema.names, name, columns)
            for column in columns or ():
                kind = schema.field(column).type
                if not is_text(kind.value_type if pyarrow.types.is_dictionary(kind) else kind):
                    raise UserError(f"{name}: column {column!r} has type {kind}, must be string")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=None if columns is None else list(columns)):
                cells = {field: cells_of(batch.column(field)) for field in batch.schema.names}
                for values in (dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)):
                    number += 1
                    where = f"{name}:{number}"
                    if any(find_surrogate(value) for value in values.values()):
                        values = _valid_values(values, where, policy)
                    if values is not None:
                        yield Row(values, where)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{name}: not a valid parquet file: {one_line_of(error)}") from None


@contextlib.contextmanager
def _seekable(file: io.BufferedReader) -> Iterator[Any]:
    """Yields the file itself, or a copy of one that is compressed or elsewhere."""
    if isinstance(file.raw, io.FileIO):
        yield file
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(file, unpacked, 2**20)
        unpacked.seek(0)
        yield unpacked


def _valid_values(values: dict[str, Any], where: str, policy: InvalidText) -> dict[str, Any] | None:
    for field, value in values.items():
        if (found := find_surrogate(value)) is not None:
            if policy.text(found[0], f"{where}: column {field!r}" if len(values) > 1 else where) is None:
                return None
            return replace_invalid(values)
    return values
