"""Files and datasets of examples → rows of named values, as a stream."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.config.data import DataConfig
from gptjax.errors import UserError
from gptjax.text import hub
from gptjax.text.clean import normalise
from gptjax.text.formats import ROW_ENDINGS, Row, missing_field, read_file_rows, text_value, without_surrogates
from gptjax.text.paths import find_files
from gptjax.text.unicode import InvalidText

MISSING_NUMBERS = (-1, -100)
"""Numbers that mean "no label" in public datasets."""


def read_rows(
    paths: Sequence[str],
    option: str,
    data: DataConfig | None = None,
    counts: Counter[str] | None = None,
    names: Sequence[str] = (),
) -> Iterator[Row]:
    """Yields the rows of files in the order given, as `formats.read_file_rows` reads them.

    Args:
        paths: Files, folders and globs; files end in one of `ROW_ENDINGS`, each also compressed.
        option: Where the paths came from ("data.path"), for error messages.
        data: Encoding, quoting and what to do with bytes that are not valid; None: the defaults.
        counts: Incremented for rows that are left out or changed.
        names: Columns of tables without a header, see `read_file_rows`.

    Raises:
        UserError: A file is missing, of another kind, or malformed; the message names file and row.
    """
    data, counts = data or DataConfig(), Counter() if counts is None else counts
    for path in find_files(paths, option, ROW_ENDINGS, counts):
        yield from read_file_rows(path, data, counts, names=names)


def read_dataset_rows(data: DataConfig, counts: Counter[str] | None = None) -> Iterator[Row]:
    """Yields the rows of `data.hf_dataset`; replaces numbers of class labels by their names.

    `counts` is incremented for rows that are left out or changed.

    Raises:
        UserError: The dataset cannot be loaded or read.
    """
    policy = InvalidText(data, Counter() if counts is None else counts)
    for number, (values, names) in enumerate(hub.dataset_rows(data), 1):
        where = f"{data.hf_dataset}:{number}"
        named = {field: _class_name(value, names.get(field), where) for field, value in values.items()}
        valid = without_surrogates(named, where, policy)
        if valid is not None:
            yield Row(valid, where)


def field_value(row: Row, name: str, option: str) -> Any:
    """The value of a row's field.

    Raises:
        UserError: The row has no such field, or it is null.
    """
    if name not in row.values:
        raise missing_field(row.where, name, option, row.values)
    if row.values[name] is None:
        raise UserError(f"{row.where}: field {name!r} is null")
    return row.values[name]


def text_field(row: Row, name: str, option: str = "data.text_field") -> str:
    """A row's text, in the field that `option` names.

    Raises:
        UserError: The field is missing, is no string, or has only white space.
    """
    text = text_value(field_value(row, name, option), row.where, name)
    if not text.strip():
        raise UserError(f"{row.where}: field {name!r} is an empty text; give it some, or take the row out")
    return text


def limited(rows: Iterator[Row], data: DataConfig) -> Iterator[Row]:
    """The first `data.max_documents` rows; 0: all."""
    return itertools.islice(rows, data.max_documents or None)


def normalised(row: Row, data: DataConfig) -> Row:
    """The row with `data.unicode` and `data.newlines` applied to all of its text."""

    def apply(value: Any) -> Any:
        if isinstance(value, str):
            return normalise(value, data)
        if isinstance(value, (list, tuple)):
            return [apply(item) for item in value]
        return {key: apply(item) for key, item in value.items()} if isinstance(value, dict) else value

    if (data.unicode, data.newlines) == ("keep", "keep"):
        return row
    return Row(apply(row.values), row.where)


def _class_name(value: Any, names: Sequence[str] | None, where: str) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_class_name(item, names, where) for item in value]
    if not isinstance(value, int) or value in MISSING_NUMBERS:
        return value
    if not 0 <= value < len(names):
        raise UserError(f"{where}: class {value} has no name among the dataset's {len(names)}")
    return names[value]
