"""Documents from the Hugging Face datasets library: a local folder or the hub, whole or streamed."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config.data import DataConfig
from gptjax.errors import UserError
from gptjax.text.formats import (
    Document,
    Row,
    missing_field,
    reads_whole_rows,
    row_text,
    without_surrogates,
)
from gptjax.text.paths import refuse_links_out
from gptjax.text.unicode import InvalidText

_SPEC = re.compile(r"(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>.+))?")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def parse_spec(spec: str) -> tuple[str, str | None, str]:
    """Cuts NAME[:CONFIG][@SPLIT] into `(name, config, split)`; the split is "train" where none is given.

    Raises:
        UserError: Not of that form, or a name that could mean another place than it says.
    """
    where = f"data.hf_dataset={spec!r}"
    if "://" in spec:
        raise UserError(f"{where} is an address; give the dataset's name, as OWNER/NAME, or a local folder")
    if "trust_remote_code" in spec:
        raise UserError(f"{where}: trust_remote_code is not supported: gptjax never runs a dataset's own code")
    if "\0" in spec or spec.startswith("~") or ".." in Path(spec.partition("@")[0]).parts:
        raise UserError(f"{where} must not hold '..', '~' or a NUL byte; give the folder's full path")
    match = _SPEC.fullmatch(spec)
    if not match:
        raise UserError(f"{where} must have the form NAME[:CONFIG][@SPLIT], such as wikitext:wikitext-2-v1@test")
    name = match["name"]
    if not os.path.isdir(name) and not _HUB_NAME.fullmatch(name):
        raise UserError(f"{where}: {name} is neither a folder that exists nor OWNER/NAME on the hub")
    return name, match["config"], match["split"] or "train"


def _check_folder(folder: Path, where: str) -> None:
    """Checks that a folder is no link to another folder, and contains no links to files outside it."""
    root = Path(os.path.realpath(folder))
    if not folder.is_absolute() and not root.is_relative_to(Path.cwd().resolve()):
        raise UserError(f"{where}: a link that leads out of the working folder, to {root}; give the folder's full path")
    for parent, folders, names in os.walk(root):
        refuse_links_out(root, (Path(parent, name) for name in (*folders, *names)))


def read_dataset(data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Yields the dataset's rows in their order.

    Raises:
        UserError: The dataset cannot be loaded or read, has no such field, or a row has no text.
    """
    rows = (values for values, _ in dataset_rows(data)) if reads_whole_rows(data) else _values_of_field(data)
    for number, values in enumerate(rows, 1):
        where = f"{data.hf_dataset}:{number}"
        row = without_surrogates(values, where, InvalidText(data, counts))
        if row is not None:
            yield Document(row_text(Row(row, where), data), where)


def _values_of_field(data: DataConfig) -> Iterator[dict[str, Any]]:
    """Yields the rows with `data.text_field` alone."""
    dataset = _load(data)
    columns = dataset.column_names
    if columns is not None and data.text_field not in columns:
        raise missing_field(f"data.hf_dataset={data.hf_dataset!r}", data.text_field, "data.text_field", columns)
    if columns is not None:
        dataset = dataset.select_columns([data.text_field])
    for batch in _items(dataset.iter(batch_size=256), data):
        if data.text_field not in batch:
            raise missing_field(f"data.hf_dataset={data.hf_dataset!r}", data.text_field, "data.text_field", batch)
        yield from ({data.text_field: value} for value in batch[data.text_field])


def dataset_rows(data: DataConfig) -> Iterator[tuple[dict[str, Any], dict[str, list[str]]]]:
    """Yields each row with all its fields, and the names of the classes of those fields that hold numbers of classes.

    Raises:
        UserError: The dataset cannot be loaded or read.
    """
    dataset = _load(data)
    names = {}
    for field, feature in (dataset.features or {}).items():
        inner = getattr(feature, "feature", feature)  # of a list, what it is a list of
        if getattr(inner, "names", None):
            names[field] = list(inner.names)
    for row in _items(dataset, data):
        yield row, names


def _items(items: Iterable[Any], data: DataConfig) -> Iterator[Any]:
    """Yields the items; errors of the library become user errors."""
    items = iter(items)
    while True:
        try:
            item = next(items, None)
        except Exception as error:
            raise _wrapped(data, error) from None
        if item is None:
            return
        yield item


def fingerprint(data: DataConfig) -> str:
    """The datasets library's identity of the prepared dataset."""
    return _load(data)._fingerprint


def _load(data: DataConfig) -> Any:
    name, config, split = parse_spec(data.hf_dataset)
    if os.path.isdir(name):
        _check_folder(Path(name), f"data.hf_dataset={data.hf_dataset!r}")
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, streaming=data.streaming)
    except Exception as error:  # of many kinds, from the library and from what it uses
        raise _wrapped(data, error) from None


def _wrapped(data: DataConfig, error: Exception) -> UserError:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    reasons = [" ".join(f"{type(cause).__name__}: {cause}".split()) for cause in causes]
    return UserError(f"data.hf_dataset={data.hf_dataset!r} cannot be read: {'; '.join(reasons)[:600]}")
