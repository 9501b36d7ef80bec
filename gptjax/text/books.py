"""EPUB and PDF → text, with the selectolax and pypdf libraries."""

import io
import logging
import posixpath
import urllib.parse
import zipfile
import zlib
from xml.etree import ElementTree

from gptjax.errors import UserError
from gptjax.text.cleaning.extra import require
from gptjax.text.cleaning.html import visible_text
from gptjax.text.streams import one_line_of

LARGEST_BOOK = 2**30
"""Largest size of an unpacked book, in bytes."""


def read_epub(file: io.IOBase, name: str) -> str:
    """Returns the text of all chapters in reading order, with an empty line between them.

    Args:
        file: A seekable file.
        name: Name of the file.

    Raises:
        UserError: It is not an EPUB, is damaged or encrypted, or unpacks to more than `LARGEST_BOOK`.
    """
    require("selectolax.lexbor", "an EPUB file", "collect")
    try:
        with zipfile.ZipFile(file) as book:
            if sum(member.file_size for member in book.infolist()) > LARGEST_BOOK:
                raise UserError(f"{name}: unpacks to more than {LARGEST_BOOK / 1e9:.1f} GB")
            package_path = _elements(book.read("META-INF/container.xml"), "rootfile")[0].attrib["full-path"]
            package = book.read(package_path)
            items = {item.attrib["id"]: item.attrib["href"] for item in _elements(package, "item")}
            chapters = []
            for reference in _elements(package, "itemref"):
                href = urllib.parse.unquote(items[reference.attrib["idref"]].partition("#")[0])
                page = book.read(posixpath.normpath(posixpath.join(posixpath.dirname(package_path), href)))
                chapters.append(visible_text(page.decode("utf-8-sig")))
    except RuntimeError as error:  # the library's error for a password
        raise UserError(f"{name}: cannot be read: {one_line_of(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name}: a chapter is not UTF-8: encrypted, or damaged") from None
    except (zipfile.BadZipFile, zlib.error, ElementTree.ParseError, KeyError, IndexError, EOFError) as error:
        raise UserError(f"{name}: not a valid EPUB: {one_line_of(error)}") from None
    return "\n\n".join(chapter for chapter in chapters if chapter)


def read_pdf(file: io.IOBase, name: str) -> str:
    """Returns the text of all pages; empty if the pages are images.

    Args:
        file: A seekable file.
        name: Name of the file.

    Raises:
        UserError: The file is no PDF, or is damaged or encrypted.
    """
    pypdf = require("pypdf", "a PDF file", "collect")
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns about every small error that it repairs
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(file).pages]
    except Exception as error:  # pypdf raises many kinds of errors
        raise UserError(f"{name}: not a PDF that can be read: {one_line_of(error)}") from None
    return "\n".join(page.encode("utf-8", "replace").decode() for page in pages)


def _elements(xml: bytes, tag: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(xml).iter() if element.tag.rpartition("}")[2] == tag]
