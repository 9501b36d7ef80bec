"""MediaWiki dumps → articles, with the mwparserfromhell library.

Source of the format: mediawiki.org/wiki/Help:Export; the elements are those of schema 0.11.
"""

import io
import re
from collections import Counter
from collections.abc import Iterator
from xml.etree import ElementTree

from gptjax.errors import UserError
from gptjax.text.cleaning.extra import require

_NOT_PROSE = {"ref", "references", "table", "gallery", "math", "timeline", "score", "syntaxhighlight", "imagemap"}
_FILE, _CATEGORY = "6", "14"
"""Keys of the namespaces whose links have no visible text in an article."""
_BLANK_LINES = re.compile(r"\n{3,}")


def read_mediawiki(file: io.BufferedReader, name: str, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yields `(text, where)` of each article: its title, an empty line, and its text without markup.

    Templates, tables, references, files and categories leave no text.

    Args:
        file: The XML, decompressed.
        name: Name of the file.
        counts: Incremented at "other_pages" for redirects and pages of other namespaces than that of articles.

    Raises:
        UserError: The file is no MediaWiki dump, or is incomplete.
    """
    require("mwparserfromhell", "a MediaWiki dump", "collect")
    hidden = {"file", "image", "category"}
    try:
        events = ElementTree.iterparse(file, ("start", "end"))
        _, root = next(events)
        if _tag(root) != "mediawiki":
            raise UserError(f"{name}: its first element is <{_tag(root)}>, must be <mediawiki>: not a MediaWiki dump")
        for event, element in events:
            if event != "end":
                continue
            if _tag(element) == "namespace" and element.get("key") in (_FILE, _CATEGORY):
                hidden.add((element.text or "").lower())
            if _tag(element) != "page":
                continue
            fields = {_tag(child): child for child in element.iter()}
            title = fields["title"].text or "" if "title" in fields else ""
            if "redirect" in fields or (fields["ns"].text if "ns" in fields else "0") != "0":
                counts["other_pages"] += 1
            else:
                markup = fields["text"].text if "text" in fields else ""
                yield f"{title}\n\n{wikitext_to_text(markup or '', frozenset(hidden))}".strip(), f"{name}:{title}"
            root.clear()  # otherwise the whole dump stays in memory
    except ElementTree.ParseError as error:
        raise UserError(f"{name}: not valid XML: {error} (is the file truncated?)") from None


def wikitext_to_text(markup: str, hidden: frozenset[str]) -> str:
    """Returns the prose of a page.

    Args:
        markup: Wikitext.
        hidden: Namespaces, in lower case, whose links are removed completely.
    """
    code = require("mwparserfromhell", "a MediaWiki dump", "collect").parse(markup)
    for tag in code.filter_tags(matches=lambda node: str(node.tag).strip().lower() in _NOT_PROSE):
        _remove(code, tag)
    for link in code.filter_wikilinks():
        if str(link.title).strip().partition(":")[0].strip().lower() in hidden and ":" in str(link.title):
            _remove(code, link)
    return _BLANK_LINES.sub("\n\n", code.strip_code(normalize=True, collapse=True))


def _remove(code, node) -> None:
    try:
        code.remove(node)
    except ValueError:  # it was inside a node that is already removed
        return


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
