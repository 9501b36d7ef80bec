"""Options of the data: sources, format, validation split."""

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
    """Sources of text, cleaning and validation split. Exactly one of path, source and hf_dataset must be set."""

    path: tuple[str, ...] = ()
    """Training data: files, folders, globs or addresses (s3://, gs://, hf://) of .txt .md .py .jsonl .csv .tsv .parquet
    .conll .conllu .mbox .warc .wet, each also .gz .zst .bz2. If named directly also .xml (MediaWiki) .epub .pdf.
    git:FOLDER reads a git repository."""
    source: Literal["", "python-stdlib"] = ""
    """Corpus that every machine has. python-stdlib: the source code of Python's standard library."""
    hf_dataset: str = ""
    """Dataset to load with the datasets library, as NAME[:CONFIG][@SPLIT]; NAME is a local folder or a dataset on the
    Hugging Face hub."""
    streaming: bool = False
    """Stream hf_dataset instead of downloading all of it."""
    text_field: str = "text"
    """Name of the field (JSONL), column (CSV, parquet) or feature (datasets) with the text; a.b is field b of a."""
    template: str = ""
    """Instead of text_field: a template that joins several fields. Field names are in braces, nested ones with dots:
    "{title}\n\n{body.text}"."""
    encoding: Literal["utf-8", "utf-16", "latin-1", "cp1252"] = "utf-8"
    """Text encoding of the files in path; parquet is always UTF-8."""
    quoting: Literal["format", "double", "none"] = "format"
    """Meaning of double quotes around fields. double: they enclose a field, in CSV and TSV; format: only in CSV; none:
    they are plain text."""
    git_endings: tuple[str, ...] = ()
    """Endings of files to read from git repositories, such as .py .md; empty: all text files."""
    unreadable_files: Literal["error", "skip"] = "error"
    """For damaged or malformed files. error: stop; skip: continue with the next file (counted, and the first ones are
    named)."""
    license: str = ""
    """Licence of the text, for the datasheet."""
    max_documents: int = 0
    """Stop reading after this many documents; 0: all."""
    validation_fraction: float = 0.1
    """Share of the documents that are used for validation, chosen by hash. A single document is split at its end."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """For bytes that are invalid in the encoding. error: stop; replace: put U+FFFD; skip: leave out the document or row
    (counted)."""
    unicode: Literal["keep", "NFC"] = "keep"
    """Unicode normalisation of texts. keep: none; NFC: canonical composition."""
    newlines: Literal["keep", "unix"] = "keep"
    """Line ends in texts. keep: unchanged; unix: CRLF and CR become LF."""
    min_characters: int = 0
    """Leave out documents with fewer characters (counted)."""
    drop_duplicates: bool = False
    """Leave out documents that equal an earlier one (counted)."""
    clean: CleanConfig = dataclasses.field(default_factory=CleanConfig)
    skip: str = ""
    """File that lists training documents without loss, one per line: a hash, or file and line, as `gptjax data` prints
    them. All other sequences stay the same."""
    packing: Literal["stream", "best_fit"] = "stream"
    """Packing of documents into windows. stream: consecutive, split at the end of a window; best_fit: whole documents
    with padding, only documents longer than a window are split (arXiv:2404.10830)."""
    attend_across_documents: bool = False
    """Let tokens attend to earlier documents in the same window."""
    verify: Literal["full", "header"] = "full"
    """Check of prepared data when a run opens it. full: every byte and every token id; header: only headers and
    sizes."""

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
