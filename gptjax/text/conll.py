"""CoNLL files → sentences. Each line has a word and its tags in columns; blank lines separate sentences.

Two conventions are supported. In CoNLL-2003, a line with the word -DOCSTART- begins a document. CoNLL-U
(https://universaldependencies.org/format.html) has ten columns, of which the first one numbers the words; comments
after "#"; lines such as "1-2" for a token of several words, and "8.1" for words that are not in the text.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gptjax.errors import UserError
from gptjax.text.unicode import InvalidText, has_surrogate

TOKENS, TAGS, XPOS = "tokens", "tags", "xpos"
SENTENCES = 32  # sentences of a document, in files without document boundaries

_DOCSTART = "-DOCSTART-"
_CONLLU_COLUMNS = 10
_NUMBER = re.compile(r"\d+([-.]\d+)?")
_TEXT = re.compile(r"#\s*text\s*=\s*(.*)")
_NEW_DOCUMENT = re.compile(r"#\s*newdoc\b")


class Sentence(NamedTuple):
    """The words of a sentence with their columns."""

    where: str
    words: list[list[str]]
    is_conllu: bool
    text: str
    """The text in CoNLL-U; empty: the words are joined by one space."""
    begins_document: bool


class _Layout(NamedTuple):
    columns: int
    is_conllu: bool


def conll_sentences(
    lines: Iterable[str], name: str, policy: InvalidText, must_be_conllu: bool = False
) -> Iterator[Sentence]:
    """Yields the sentences of a file in their order.

    Columns are separated by tabs (or, in a line without a tab, by spaces).

    Args:
        lines: Lines of the file, decoded by `formats`.
        name: Name of the file, for error messages.
        policy: Policy for bytes that are not UTF-8.
        must_be_conllu: Whether the file's ending is that of CoNLL-U.

    Raises:
        UserError: A line has another number of columns than the first, or a file that is not CoNLL-U numbers words.
    """
    numbered, layout = _find_layout(lines, name, must_be_conllu)
    words, first, text, begins, valid, checked = [], 0, "", False, True, layout.is_conllu
    for number, raw in itertools.chain(numbered, [(0, "")]):
        line = raw.rstrip("\r\n")
        if has_surrogate(line):
            repaired = policy.text(line, f"{name}:{number}")
            valid = valid and repaired is not None
            line = line if repaired is None else repaired
        cells = _cells(line)
        if not cells or cells[0] == _DOCSTART:
            if words and not checked:
                checked = len(words) > 1
                _refuse_numbers(words, f"{name}:{first}")
            if words and valid:
                yield Sentence(f"{name}:{first}", words, layout.is_conllu, text, begins)
            begins = bool(cells) or (begins and not (words and valid))
            words, text, valid = [], "", True
        elif _is_comment(cells, line, layout, inside=bool(words)):
            begins = begins or bool(_NEW_DOCUMENT.match(line))
            given = _TEXT.match(line)
            text = given[1].strip() if given and layout.is_conllu else text
        elif len(cells) != layout.columns:
            raise UserError(f"{name}:{number}: {len(cells)} columns, must be {layout.columns} as in the first line")
        elif not layout.is_conllu or cells[0].isdigit():
            first = first if words else number
            words.append(cells)
        elif not _NUMBER.fullmatch(cells[0]):
            raise UserError(f"{name}:{number}: {cells[0]!r} is no number of a word, as CoNLL-U has in its first column")


def sentence_row(sentence: Sentence) -> dict[str, Any]:
    """The fields of a sentence as a row: "tokens", and "tags" if the file has tags.

    They are the first and the last column. In CoNLL-U they are FORM and UPOS, and XPOS is "xpos". "_" means "no tag"
    and becomes None.
    """
    if sentence.is_conllu:
        columns = {TOKENS: 1, TAGS: 3, XPOS: 4}
        rows = {field: [word[column] for word in sentence.words] for field, column in columns.items()}
        return {k: v if k == TOKENS else [None if tag == "_" else tag for tag in v] for k, v in rows.items()}
    tokens = {TOKENS: [word[0] for word in sentence.words]}
    return tokens if len(sentence.words[0]) < 2 else tokens | {TAGS: [word[-1] for word in sentence.words]}


def sentence_documents(sentences: Iterable[Sentence]) -> Iterator[tuple[str, str]]:
    """Yields `(text, where)` of documents with one sentence per line, without tags.

    Documents are those marked in the file, or `SENTENCES` sentences if it marks none.
    """
    lines: list[str] = []
    where, marked = "", False
    for sentence in sentences:
        marked = marked or sentence.begins_document
        if lines and (sentence.begins_document or (len(lines) == SENTENCES and not marked)):
            yield "\n".join(lines) + "\n", where
            lines = []
        where = where if lines else sentence.where
        lines.append(sentence.text or " ".join(sentence_row(sentence)[TOKENS]))
    if lines:
        yield "\n".join(lines) + "\n", where


def _find_layout(lines: Iterable[str], name: str, must_be_conllu: bool) -> tuple[Iterator[tuple[int, str]], _Layout]:
    """Returns all lines with their numbers, and the layout of columns, found from the first line with a word."""
    numbered = enumerate(lines, 1)
    head: list[tuple[int, str]] = []
    number, cells = 1, []
    for number, line in numbered:
        head.append((number, line))
        if (found := _cells(line.rstrip("\r\n"))) and found[0] != _DOCSTART:
            cells = found
            if not line.startswith("#"):
                break
    is_conllu = len(cells) == _CONLLU_COLUMNS and bool(_NUMBER.fullmatch(cells[0]))
    if must_be_conllu and cells and not is_conllu:
        raise UserError(
            f"{name}:{number}: {len(cells)} columns that begin with {cells[0]!r}; CoNLL-U has {_CONLLU_COLUMNS} that"
            " begin with the word's number; name the file .conll if it is another format"
        )
    return itertools.chain(head, numbered), _Layout(len(cells), is_conllu)


def _cells(line: str) -> list[str]:
    return line.split("\t") if "\t" in line and line.strip() else line.split()


def _is_comment(cells: list[str], line: str, layout: _Layout, inside: bool) -> bool:
    """Whether a line is a comment. Outside of CoNLL-U, "#" can also be the first word of a sentence."""
    return line.startswith("#") and (layout.is_conllu or (not inside and len(cells) != layout.columns))


def _refuse_numbers(words: list[list[str]], where: str) -> None:
    if len(words) > 1 and [word[0] for word in words] == [str(n) for n in range(1, len(words) + 1)]:
        raise UserError(
            f"{where}: the first column numbers the words of a sentence, which only CoNLL-U does ({_CONLLU_COLUMNS}"
            f" columns, not {len(words[0])}); take the column out, so that the word comes first"
        )
