"""Files and datasets of labelled examples → rows of named values, as a stream."""

import contextlib
import csv
import io
import itertools
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config.run import DataConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.text import hub
from gptjax.text.formats import (
    COMPRESSIONS,
    conll_sentences,
    decode_utf8,
    ending,
    json_object,
    named_errors,
    open_binary,
)

ROW_ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet", ".conll")
CONLL_TOKENS, CONLL_TAGS = "tokens", "tags"
_STRICT = DataConfig()


class Row(NamedTuple):
    """One example as it was read, and where it stands ("a.jsonl:17") for error messages."""

    values: dict[str, Any]
    where: str


def read_rows(paths: Sequence[str], option: str) -> Iterator[Row]:
    """Yields the rows of files in the order given.

    CoNLL sentences become rows with the fields "tokens" (the first column) and "tags" (the last).

    Args:
        paths: Files whose ending is one of `ROW_ENDINGS`, each also compressed.
        option: Where the paths came from ("data.path"), for error messages.

    Raises:
        UserError: A file is missing, of another kind, or malformed; the message names file and row.
    """
    for given in paths:
        path = Path(given).expanduser()
        if not path.is_file():
            near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
            raise UserError(f"{option}: {given}: no such file.{near}")
        if ending(path) not in ROW_ENDINGS:
            raise UserError(
                f"{option}: {given}: rows are read from files that end in one of {' '.join(ROW_ENDINGS)},"
                f" each also {' or '.join(COMPRESSIONS)}"
            )
        readers = {".jsonl": _jsonl, ".parquet": _parquet, ".conll": _conll}
        with named_errors(path), open_binary(path) as file:
            yield from readers.get(ending(path), _table)(file, str(path))


def read_dataset_rows(data: DataConfig) -> Iterator[Row]:
    """Yields the rows of `data.hf_dataset`, numbers of class labels replaced by their names.

    Raises:
        UserError: The dataset cannot be loaded or read.
    """
    for number, (values, names) in enumerate(hub.dataset_rows(data), 1):
        named = {field: _class_name(value, names.get(field)) for field, value in values.items()}
        yield Row(named, f"{data.hf_dataset}:{number}")


def field(row: Row, name: str, option: str) -> Any:
    """The value of a row's field.

    Raises:
        UserError: The row has no such field, or it is null.
    """
    if name not in row.values:
        near = did_you_mean(name, row.values) or f" It has: {', '.join(map(repr, row.values)) or 'no field'}."
        raise UserError(f"{row.where}: no field {name!r}; set {option} to the one that is meant.{near}")
    if row.values[name] is None:
        raise UserError(f"{row.where}: field {name!r} is null")
    return row.values[name]


def limited(rows: Iterator[Row], data: DataConfig) -> Iterator[Row]:
    """The first `data.max_documents` rows; 0: all."""
    return itertools.islice(rows, data.max_documents or None)


def _class_name(value: Any, names: Sequence[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_class_name(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _jsonl(file: io.BufferedReader, name: str) -> Iterator[Row]:
    for number, raw in enumerate(file, 1):
        where = f"{name}:{number}"
        line = _decoded(raw, where).removeprefix("\ufeff" if number == 1 else "")
        if not line.strip():
            continue
        yield Row(json_object(line, where, whole=raw.endswith(b"\n")), where)


def _table(file: io.BufferedReader, name: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    tabs = ending(Path(name)) == ".tsv"
    lines = (_decoded(raw, f"{name}:{number}") for number, raw in enumerate(file, 1))
    rows = csv.reader(lines, strict=True, delimiter="\t" if tabs else ",")
    try:
        header = [cell.removeprefix("\ufeff") for cell in next(rows, [])]
        for cells in rows:
            where = f"{name}:{rows.line_num}"
            if cells and len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} fields, must be {len(header)} as in the header")
            if cells:
                yield Row(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise UserError(f"{name}:{rows.line_num}: not a valid table: {error} (is the file truncated?)") from None


def _parquet(file: io.BufferedReader, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        source: Any = file
        if not isinstance(file.raw, io.FileIO):  # compressed: the footer stands at the end
            source = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, source, 2**20)
        try:
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=256)
            values = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(values, 1):
                yield Row(row, f"{name}:{number}")
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{name}: not a valid parquet file: {' '.join(str(error).split())}") from None


def _conll(file: io.BufferedReader, name: str) -> Iterator[Row]:
    for first, words in conll_sentences(file, name, _STRICT, Counter()):
        if len(words[0]) < 2:
            raise UserError(f"{name}:{first}: 1 column, must be at least 2: a word and its tag")
        yield Row({CONLL_TOKENS: [w[0] for w in words], CONLL_TAGS: [w[-1] for w in words]}, f"{name}:{first}")


def _decoded(raw: bytes, where: str) -> str:
    text = decode_utf8(raw, where, _STRICT, Counter())
    assert text is not None  # the policy is to raise
    return text


def text_of(row: Row, name: str) -> str:
    """A row's text.

    Raises:
        UserError: It is missing, no string, or has nothing but spaces.
    """
    text = field(row, name, "data.text_field")
    if not isinstance(text, str):
        raise UserError(f"{row.where}: field {name!r} is a {type(text).__name__}, must be a string")
    if not text.strip():
        raise UserError(f"{row.where}: field {name!r} is an empty text; give it some, or take the row out")
    return text
