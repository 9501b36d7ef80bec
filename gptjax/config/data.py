"""Options of the text: where it comes from, how it is read and split."""

import dataclasses
import re
from typing import Literal

from gptjax.config.clean import CleanConfig
from gptjax.config.rules import no_effect, not_negative, usable_paths, without_credentials
from gptjax.errors import UserError

TEMPLATE_FIELD = re.compile(r"\{([\w-]+(?:\.[\w-]+)*)\}")
"""A field in `data.template`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from, and how it is cleaned and split. One of path, source and hf_dataset is given."""

    path: tuple[str, ...] = ()
    """Files, folders, globs or addresses (s3://, gs://, hf://): .txt .md .py .jsonl .csv .tsv .parquet .conll .conllu
    .mbox .warc .wet, and by name .xml (MediaWiki) .epub .pdf, each also .gz .zst .bz2; git:FOLDER is a repository."""
    source: Literal["", "python-stdlib"] = ""
    """A corpus that every machine has: python-stdlib is the running Python's standard library."""
    hf_dataset: str = ""
    """NAME[:CONFIG][@SPLIT] for the datasets library: a local folder or the hub."""
    streaming: bool = False
    """Read hf_dataset as a stream instead of downloading it whole."""
    text_field: str = "text"
    """Field (JSONL), column (CSV, parquet) or feature (datasets) that holds the text; a.b is field b inside a."""
    template: str = ""
    """In place of text_field: a text with several fields of a row in braces, nested ones with dots, such as
    "{title}\n\n{body.text}"."""
    encoding: Literal["utf-8", "utf-16", "latin-1", "cp1252"] = "utf-8"
    """Encoding of the files of path; parquet is always UTF-8."""
    quoting: Literal["format", "double", "none"] = "format"
    """Double quotes around fields of CSV and TSV. format: CSV has them, TSV has not; none: they are plain text."""
    git_endings: tuple[str, ...] = ()
    """Endings of the files that are read of git repositories, such as .py .md; none: all text files."""
    unreadable_files: Literal["error", "skip"] = "error"
    """A file that is damaged or malformed: stop, or go on with the next file (counted and named)."""
    license: str = ""
    """Licence of the text, for the datasheet."""
    max_documents: int = 0
    """Stop reading after this many documents; 0: all."""
    validation_fraction: float = 0.1
    """Share of the text that is used for validation: documents, chosen by hash; of a single document, its end."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """Bytes that are not valid in the encoding: stop, put U+FFFD, or leave the document or row out (counted)."""
    unicode: Literal["keep", "NFC"] = "keep"
    """Unicode normalisation."""
    newlines: Literal["keep", "unix"] = "keep"
    """unix: CRLF and lone CR become LF."""
    min_characters: int = 0
    """Leave out shorter documents (counted)."""
    drop_duplicates: bool = False
    """Leave out documents whose text came before (counted)."""
    clean: CleanConfig = dataclasses.field(default_factory=CleanConfig)
    skip: str = ""
    """File with a document on each line (its hash, or file and line, as `gptjax data` prints them): they are no longer
    trained on, and every other sequence stays the same."""
    packing: Literal["stream", "best_fit"] = "stream"
    """How documents fill windows. stream: one after another, cut where a window ends; best_fit: whole, with padding;
    only those longer than a window are cut (arXiv:2404.10830)."""
    attend_across_documents: bool = False
    """Let tokens attend to earlier documents in the same window."""
    verify: Literal["full", "header"] = "full"
    """How prepared data is checked when a run opens it: every byte and every id, or headers and sizes only."""

    def __post_init__(self):
        given = [name for name in ("path", "source", "hf_dataset") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"data.{given[0]} and data.{given[1]} are both set; give one")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1")
        not_negative("data", self, "max_documents", "min_characters")
        usable_paths("data", self, "path", "skip")
        for path in self.path:
            without_credentials("data.path", path)
        repositories = any(path.startswith("git:") for path in self.path)
        no_effect("data", self, "git_endings", repositories, "a git:FOLDER in data.path")
        for ending in self.git_endings:
            if not re.fullmatch(r"\.[a-z0-9+_-]+", ending):
                raise UserError(f"data.git_endings: {ending!r} must be like .py: a dot, and small letters or digits")
        no_effect("data", self, "streaming", bool(self.hf_dataset), "data.hf_dataset")
        for name in ("encoding", "quoting", "unreadable_files"):
            no_effect("data", self, name, bool(self.path), "data.path")
        no_effect("data", self, "text_field", not self.template, "an empty data.template")
        if self.template and not TEMPLATE_FIELD.search(self.template):
            raise UserError(f"data.template={self.template!r} must name a field in braces, such as {{title}}")
        if self.source:
            for name in ("text_field", "template", "invalid_utf8"):
                no_effect("data", self, name, False, "text of your own")
