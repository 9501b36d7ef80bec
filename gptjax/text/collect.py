"""Files that hold many documents in formats of the web and of mail: WARC and WET, mbox."""

import email
import email.policy
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO

from gptjax.errors import UserError

_CHARSET = re.compile(rb"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
_ESCAPED = re.compile(rb">+From ")
_META = 2048
"""Bytes at the start of a page that are searched for the name of its encoding."""
_BATCH = 2**20

Decode = Callable[[bytes, str], str | None]
"""Decodes UTF-8 by the policy `data.invalid_utf8`; None: leave the document out."""


def read_mbox(file: io.BufferedReader, name: str, decode: Decode) -> Iterator[tuple[str, str]]:
    """Yields `(text, where)` of each mail: its subject, an empty line, and its body, plain text rather than HTML.

    Mails begin with a line "From " after an empty line or at the beginning. Attachments are not read.
    """
    lines: list[bytes] = []
    first, blank = 1, True
    for number, line in enumerate(file, 1):
        if blank and line.startswith(b"From "):
            yield from _mail(lines, f"{name}:{first}", decode)
            lines, first = [], number
        else:
            lines.append(line)
        blank = not line.strip()
    yield from _mail(lines, f"{name}:{first}", decode)


def _mail(lines: list[bytes], where: str, decode: Decode) -> Iterator[tuple[str, str]]:
    if not any(line.strip() for line in lines):
        return
    if not lines[-1].strip():  # the empty line separates mails
        lines = lines[:-1]
    lines = [line[1:] if _ESCAPED.match(line) else line for line in lines]
    message = email.message_from_bytes(b"".join(lines), policy=email.policy.default)
    try:
        body = message.get_body(("plain", "html"))
        raw = body.get_payload(decode=True) if body is not None else b""
        subject, charset = str(message["subject"] or ""), body.get_content_charset() if body is not None else None
    except (LookupError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: not a valid mail: {' '.join(str(error).split())}") from None
    text = _decoded(raw if isinstance(raw, bytes) else b"", charset, where, decode)
    if text is not None:
        subject = subject.encode("utf-8", "replace").decode()
        yield (f"{subject}\n\n{text}" if subject else text), where


def read_warc(file: io.BufferedReader, name: str, decode: Decode, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yields `(text, where)` of each page of a WARC file and of each text of a WET file.

    Args:
        file: Decompressed.
        name: Of the file.
        decode: See `Decode`; a page is decoded by the encoding that it names.
        counts: Incremented at "other_records" for records that are no page, or a page stored compressed or in chunks.

    Raises:
        UserError: It is not a WARC file.
        EOFError: A record is truncated.
    """
    number = 0
    while line := file.readline():
        if not line.strip():
            continue
        number += 1
        if not line.startswith(b"WARC/"):
            raise UserError(f"{name}: record {number} begins with {line[:20]!r}, must begin with b'WARC/'")
        headers = _headers(file)
        length = headers.get("content-length", "")
        if not length.isdigit():
            raise UserError(f"{name}: record {number} has no Content-Length")
        content = _read_exactly(file, int(length))
        where = f"{name}:{headers.get('warc-target-uri', f'record {number}')}"
        kind = headers.get("warc-type")
        text: str | None = None
        if kind == "conversion":
            text = decode(content, where)
        elif kind == "response" and (page := _page(content)) is not None:
            body, charset = page
            text = _decoded(body, charset, where, decode)
        else:
            counts["other_records"] += 1
        if text is not None:
            yield text, where


def _page(content: bytes) -> tuple[bytes, str | None] | None:
    """The body of an HTTP response and its encoding; None if it is not text, or is compressed or chunked."""
    head, _, body = content.partition(b"\r\n\r\n")
    headers = _headers(io.BytesIO(head.partition(b"\r\n")[2] + b"\r\n\r\n"))
    kind = headers.get("content-type", "")
    if not kind.startswith(("text/html", "text/plain", "application/xhtml")):
        return None
    if headers.get("content-encoding", "identity") != "identity" or "transfer-encoding" in headers:
        return None
    found = _CHARSET.search(kind.encode()) or _CHARSET.search(body[:_META])
    return body, found[1].decode() if found else None


def _headers(file: IO[bytes]) -> dict[str, str]:
    """Reads header lines up to an empty one; names in lower case."""
    headers = {}
    while line := file.readline().strip():
        key, _, value = line.decode("utf-8", "replace").partition(":")
        headers[key.strip().lower()] = value.strip()
    return headers


def _decoded(raw: bytes, charset: str | None, where: str, decode: Decode) -> str | None:
    if charset:
        try:
            return raw.decode(charset)
        except (LookupError, UnicodeDecodeError):
            pass  # pages often name a wrong encoding; then UTF-8 is tried
    return decode(raw, where)


def _read_exactly(file: io.BufferedReader, size: int) -> bytes:
    chunks = []
    while size:  # in chunks: a damaged length must not allocate a huge buffer
        chunk = file.read(min(size, _BATCH))
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
