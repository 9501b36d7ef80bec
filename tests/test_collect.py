"""Mail and web archives, written by the standard library or by hand."""

import email.message
import gzip
import mailbox
from collections import Counter

import pytest

from gptjax.config.clean import CleanConfig
from gptjax.config.data import DataConfig
from gptjax.errors import UserError
from gptjax.text.formats import read_file
from gptjax.text.sources import read_documents


def read(path, **options) -> tuple[list[tuple[str, str]], Counter]:
    counts = Counter()
    return [(d.text, d.where) for d in read_file(path, DataConfig(**options), counts)], counts


def test_a_mailbox_gives_subject_and_body_of_each_mail(tmp_path):
    path = tmp_path / "a.mbox"
    box = mailbox.mbox(path)
    plain = email.message.EmailMessage()
    plain["Subject"] = "Grüße"
    plain.set_content("Line one\n\nFrom here on é.\n", charset="latin-1")
    both = email.message.EmailMessage()
    both.set_content("the plain part\n")
    both.add_alternative("<p>the other part</p>", subtype="html")
    both.add_attachment(b"\x00\x01", maintype="application", subtype="octet-stream")
    for message in (plain, both):
        box.add(message)
    box.close()
    documents, _ = read(path)
    assert [text for text, _ in documents] == ["Grüße\n\nLine one\n\nFrom here on é.\n", "the plain part\n"]
    lines = path.read_bytes().splitlines()
    for _, where in documents:
        assert lines[int(where.rpartition(":")[2]) - 1].startswith(b"From ")


def record(kind: str, content: bytes, uri: str = "http://a.org/x") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content + b"\r\n\r\n"


def response(headers: str, body: bytes) -> bytes:
    return record("response", f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode() + body)


def test_web_archives_give_pages_and_count_the_rest(tmp_path):
    path = tmp_path / "a.warc.gz"
    records = [
        record("warcinfo", b"software: x"),
        response("Content-Type: text/html; charset=latin-1", "<p>caf\xe9</p>".encode("latin-1")),
        response("Content-Type: text/html", '<meta charset="cp1252"><p>\u20ac</p>'.encode("cp1252")),
        response("Content-Type: text/html; charset=ascii", "<p>\u20ac</p>".encode()),
        response("Content-Type: text/html\r\nContent-Encoding: gzip", b"\x1f\x8b"),
        response("Content-Type: image/png", b"\x89PNG"),
        record("conversion", "plain \u03b1\n\nWARC/1.0".encode(), "http://b.org/"),
    ]
    path.write_bytes(b"".join(gzip.compress(one) for one in records))
    documents, counts = read(path)
    assert [text for text, _ in documents] == [
        *("<p>caf\xe9</p>", '<meta charset="cp1252"><p>\u20ac</p>', "<p>\u20ac</p>", "plain \u03b1\n\nWARC/1.0"),
    ]
    assert documents[-1][1] == f"{path}:http://b.org/"
    assert counts == {"other_records": 3}


@pytest.mark.parametrize(
    "content,message",
    [
        (record("conversion", b"x" * 500)[:-100], "truncated"),
        (b"no archive", "must begin with b'WARC/'"),
        (b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nabc", "no Content-Length"),
        (record("conversion", b"\xff\xfe"), "not UTF-8"),
    ],
)
def test_damaged_archives_are_named(tmp_path, content, message):
    path = tmp_path / "a.wet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_pages_are_read_where_cleaning_makes_text_of_them(tmp_path):
    (tmp_path / "a.html").write_text("<html><p>page</p></html>")
    (tmp_path / "b.txt").write_text("text")
    counts = Counter()
    texts = [d.text for d in read_documents(DataConfig(path=(str(tmp_path),)), counts)]
    assert (texts, counts["unknown_files"]) == (["text"], 1)
    data = DataConfig(path=(str(tmp_path),), clean=CleanConfig(html="visible"))
    assert len(list(read_documents(data, Counter()))) == 2
