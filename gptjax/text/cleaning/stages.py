"""The cleaning stages that process one document at a time, in order."""

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.data import DataConfig
from gptjax.config.functions import load_function
from gptjax.errors import UserError
from gptjax.text.clean import normalise
from gptjax.text.cleaning.extra import require, version
from gptjax.text.cleaning.html import is_html, main_text, visible_text
from gptjax.text.cleaning.ngrams import word_ngrams
from gptjax.text.cleaning.personal import replace_personal_data
from gptjax.text.cleaning.quality import apply_rules
from gptjax.text.formats import ENDINGS, ROW_ENDINGS, ending, read_file, read_file_rows
from gptjax.text.paths import find_files
from gptjax.text.remote import File, file_identity
from gptjax.text.unicode import has_surrogate

LANGUAGE_CHARACTERS = 2000
"""Characters of a document that are used to detect its language: the library is slow, because it is written in
Python.
"""
FILTER = "data.clean.filter"
_LIBRARIES = {"html": ("selectolax", "trafilatura"), "repair": ("ftfy",), "languages": ("py3langid",)}


class Stage(NamedTuple):
    """One step for one document."""

    name: str
    apply: Callable[[str, Counter[str]], tuple[str, str]]
    """Maps a text and the counts of replacements to the new text and the reason to remove it (empty: keep)."""


def make_stages(data: DataConfig) -> list[Stage]:
    """Returns the stages that the options turn on. The last one removes documents that are empty or too short.

    Raises:
        UserError: A library is missing, a language is unknown, the user's function cannot be imported, or a file of
            evaluation data cannot be read.
    """
    clean = data.clean
    made: dict[str, Callable[[str, Counter[str]], tuple[str, str]]] = {}
    if clean.html != "keep":
        extract = visible_text if clean.html == "visible" else main_text
        require("selectolax.lexbor" if clean.html == "visible" else "trafilatura")
        made["html"] = lambda text, _: (extract(text) if is_html(text) else text, "")
    if clean.repair:
        fix = require("ftfy").fix_text
        made["repair"] = lambda text, _: (fix(text), "")
    if data.newlines != "keep" or data.unicode != "keep":
        made["normalise"] = lambda text, _: (normalise(text, data), "")
    if clean.languages:
        made["language"] = _language_stage(clean.languages, clean.language_confidence)
    if clean.quality.rules:
        made["quality"] = lambda text, _: _with_reason(*apply_rules(text, clean.quality))
    if clean.filter:
        made["filter"] = _filter_stage(clean.filter)
    if clean.personal_data:
        made["personal_data"] = lambda text, counts: (replace_personal_data(text, clean.personal_data, counts), "")
    if clean.decontaminate:
        made["decontaminate"] = _decontamination_stage(data)
    made["length"] = lambda text, _: (text, "empty" if not text else "short" if len(text) < data.min_characters else "")
    return [Stage(name, apply) for name, apply in made.items()]


def stages_identity(data: DataConfig) -> dict[str, Any]:
    """Everything besides the options that affects the result: versions of libraries, content of files that stages read.

    Raises:
        UserError: The user's function cannot be imported, or a file is missing.
    """
    clean = data.clean
    used = [("html", clean.html != "keep"), ("repair", clean.repair), ("languages", bool(clean.languages))]
    libraries = {name: version(name) for option, on in used if on for name in _LIBRARIES[option]}
    files = [(str(file), *file_identity(file)[1:]) for file in evaluation_files(data)]
    return {"libraries": libraries, "files": files, "filter": _source_of(clean.filter) if clean.filter else ""}


def evaluation_files(data: DataConfig) -> list[File]:
    """The files of `data.clean.decontaminate`.

    Raises:
        UserError: A file is missing or of an unknown kind.
    """
    paths = data.clean.decontaminate
    return find_files(paths, "data.clean.decontaminate", ENDINGS, Counter()) if paths else []


def _with_reason(text: str, broken: str) -> tuple[str, str]:
    return text, f"quality_{broken}" if broken else ""


def make_language_of() -> Callable[[str], str]:
    """Returns the function that names the language of a text, as ISO 639.

    Raises:
        UserError: py3langid is missing.
    """
    identifier = _identifier()
    return lambda text: identifier.classify(text[:LANGUAGE_CHARACTERS])[0]


@functools.cache
def _identifier() -> Any:
    library = require("py3langid.langid")
    return library.LanguageIdentifier.from_model_file(library.MODEL_FILE, norm_probs=True)


def _language_stage(languages: tuple[str, ...], confidence: float) -> Callable[[str, Counter[str]], tuple[str, str]]:
    identifier = _identifier()
    for language in languages:
        if language not in identifier.labels:
            known = " ".join(identifier.labels)
            raise UserError(f"data.clean.languages: {language!r} is not a language that py3langid knows: {known}")

    def apply(text: str, _: Counter[str]) -> tuple[str, str]:
        language, probability = identifier.classify(text[:LANGUAGE_CHARACTERS])
        return text, "" if language in languages and probability >= confidence else "language"

    return apply


def _filter_stage(path: str) -> Callable[[str, Counter[str]], tuple[str, str]]:
    function = load_function(path, FILTER)

    def apply(text: str, _: Counter[str]) -> tuple[str, str]:
        result = function(text)
        if result is None:
            return text, "filter"
        if not isinstance(result, str) or has_surrogate(result):
            what = "half of a surrogate pair" if isinstance(result, str) else type(result).__name__
            raise UserError(
                f"data.clean.filter={path} returned {what}; it must return a text, or None to leave the document out"
            )
        return result, ""

    return apply


def _source_of(path: str) -> str:
    """The source of the module with the user's function, so that the data is prepared again if it changes."""
    module = inspect.getmodule(load_function(path, FILTER))
    try:
        return inspect.getsource(module) if module else ""
    except (OSError, TypeError):  # a module without Python source
        return ""


def _decontamination_stage(data: DataConfig) -> Callable[[str, Counter[str]], tuple[str, str]]:
    """Removes documents that share a word n-gram with the evaluation data.

    An evaluation text of fewer than n words removes only documents that equal it, because a few words occur everywhere.
    """
    n = data.clean.decontaminate_ngram
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *(word_ngrams(t, n) for t in _evaluation_texts(data))]))

    def apply(text: str, _: Counter[str]) -> tuple[str, str]:
        hashes = word_ngrams(text, n)
        places = np.searchsorted(known, hashes)
        found = known[np.minimum(places, len(known) - 1)] == hashes if len(known) else np.zeros(0, bool)
        return text, "contaminated" if found.any() else ""

    return apply


def _evaluation_texts(data: DataConfig) -> Iterator[str]:
    """Every text in the files: in rows, the text of each field and of each list item."""
    plain = DataConfig(invalid_utf8="replace")
    for path in evaluation_files(data):
        if ending(path) in ROW_ENDINGS:
            for row in read_file_rows(path, plain, Counter()):
                yield from _texts_in(row.values)
        else:
            yield from (document.text for document in read_file(path, plain, Counter()))


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if re.search(r"\w", value):
            yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)
