"""HTML → text, with the selectolax and trafilatura libraries."""

import functools
import re
from typing import Any

from gptjax.text.cleaning.extra import require

_TAG = re.compile(
    r"</?(?:html|head|body|title|meta|link|script|style|div|span|p|a|b|i|u|br|hr|h[1-6]|ul|ol|li|dl|dt|dd|table|tbody"
    r"|tr|td|th|font|center|img|form|input|strong|em|pre)\b[^<>]*>",
    re.IGNORECASE,
)
_BEGINNING = re.compile(r"\s*(?:<\?xml[^<>]*>\s*)?<(?:!doctype\s+html|html)\b", re.IGNORECASE)
_SHARE_OF_TAGS = 0.1
_NOT_SEEN = "script, style, noscript, template, head"
_BLOCKS = (
    "p, div, br, hr, h1, h2, h3, h4, h5, h6, ul, ol, li, dl, dt, dd, table, tr, pre, blockquote, section, article,"
    " header, footer, nav, main, aside, form, center"
)
_BREAK = "\u2029"  # a separate character, because white space in HTML is not significant
_SPACE = re.compile(r"[ \t\r\n\f]+")
_BREAKS = re.compile(f" *(?:{_BREAK} *)+")


def is_html(text: str) -> bool:
    """Whether a text begins like an HTML document, or at least a tenth of its characters are HTML tags."""
    if "<" not in text:
        return False
    if _BEGINNING.match(text):
        return True
    return sum(len(tag[0]) for tag in _TAG.finditer(text)) >= _SHARE_OF_TAGS * len(text)


def visible_text(html: str) -> str:
    """The text that a browser would show, each block on a separate line."""
    tree = _parser()(html)
    for node in tree.css(_NOT_SEEN):
        node.decompose()
    for node in tree.css(_BLOCKS):
        node.insert_before(_BREAK)
        node.insert_after(_BREAK)
    for node in tree.css("td, th"):
        node.insert_before(" ")
    text = tree.root.text(separator="") if tree.root is not None else ""
    return _BREAKS.sub("\n", _SPACE.sub(" ", text)).strip()


def main_text(html: str) -> str:
    """The main text of a page (trafilatura); empty if there is none."""
    trafilatura = require("trafilatura")
    return trafilatura.extract(html, include_comments=False, include_tables=True, fast=True) or ""


@functools.cache
def _parser() -> Any:
    return require("selectolax.lexbor").LexborHTMLParser
