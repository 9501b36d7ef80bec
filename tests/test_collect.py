"""Mail, archives of the web, wikis, books, repositories and addresses, written by other libraries or by hand."""

import bz2
import dataclasses
import email.message
import gzip
import importlib
import importlib.util
import json
import mailbox
import os
import shutil
import subprocess
import zipfile
from collections import Counter

import pytest

from gptjax.config.clean import CleanConfig
from gptjax.config.data import DataConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.text.counts import counted, leaves_out
from gptjax.text.formats import read_file
from gptjax.text.prepare import prepare
from gptjax.text.sources import read_documents, source_fingerprint


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


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="de">
<siteinfo><namespaces><namespace key="6">Datei</namespace>
<namespace key="14">Kategorie</namespace></namespaces></siteinfo>
<page><title>Wasser</title><ns>0</ns><id>1</id><revision><id>2</id><text>'''Wasser''' ist [[Stoff|nass]].{{Box|a={{b}}}}
&lt;ref&gt;Quelle [[Datei:in.png]]&lt;/ref&gt;[[Datei:a.png|thumb|ein [[Bild]]]]
{| class="x"
| Zelle
|}
== Orte ==
Fluss&lt;!-- nichts --&gt; und [https://a.org See].
[[Kategorie:Stoffe]]</text></revision></page>
<page><title>H2O</title><ns>0</ns><redirect title="Wasser"/><revision><text>#REDIRECT</text></revision></page>
<page><title>Diskussion:Wasser</title><ns>1</ns><revision><text>talk</text></revision></page>
<page><title>Leer</title><ns>0</ns><revision><text/></revision></page>
</mediawiki>"""


def test_articles_of_a_wiki_lose_their_markup_and_other_pages_are_counted(tmp_path):
    pytest.importorskip("mwparserfromhell", reason="needs the extra `collect`")
    path = tmp_path / "a.xml.bz2"
    half = len(DUMP) // 2  # two streams, as dumps with an index have them
    path.write_bytes(bz2.compress(DUMP[:half].encode()) + bz2.compress(DUMP[half:].encode()))
    documents, counts = read(path)
    text = documents[0][0]
    assert text.startswith("Wasser\n\nWasser ist nass.")
    assert text.endswith("Fluss und See.") and "Orte" in text
    for markup in ("Quelle", "Bild", "Zelle", "Kategorie", "{", "[", "nichts"):
        assert markup not in text
    assert documents[1] == ("Leer", f"{path}:Leer")
    assert (len(documents), counts) == (2, {"other_pages": 2})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="truncated"):
        read(path)


def write_epub(path, chapters: dict[str, str], order: list[str]) -> None:
    items = "".join(f'<item id="{name}" href="text/{name}%20x.xhtml"/>' for name in chapters)
    spine = "".join(f'<itemref idref="{name}"/>' for name in order)
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("META-INF/container.xml", '<c xmlns="u"><rootfile full-path="OPS/a.opf"/></c>')
        book.writestr("OPS/a.opf", f'<package xmlns="v"><manifest>{items}</manifest><spine>{spine}</spine></package>')
        for name, body in chapters.items():
            book.writestr(f"OPS/text/{name} x.xhtml", f"<html><head><title>no</title></head><body>{body}</body></html>")


def test_a_book_is_read_in_the_order_of_its_spine(tmp_path):
    pytest.importorskip("selectolax", reason="needs the extra `collect`")
    path = tmp_path / "a.epub"
    write_epub(path, {"a": "<p>One &amp; two</p><p>é</p>", "b": "<h1>First</h1>", "c": "<p>not read</p>"}, ["b", "a"])
    assert read(path)[0] == [("First\n\nOne & two\né", str(path))]
    packed = tmp_path / "b.epub.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed)[0][0][0] == "First\n\nOne & two\né"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match="not a valid EPUB"):
        read(path)


def test_the_pages_of_a_pdf_are_read(tmp_path):
    pypdf = pytest.importorskip("pypdf", reason="needs the extra `collect`")
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    for words in ("First page", "Second (page)"):
        page = writer.add_blank_page(200, 200)
        font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        named = DictionaryObject({NameObject(k): NameObject(v) for k, v in font.items()})
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(named)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content, escaped = DecodedStreamObject(), words.replace("(", "\\(").replace(")", "\\)")
        content.set_data(f"BT /F1 12 Tf 10 100 Td ({escaped}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(content)
    path = tmp_path / "a.pdf"
    writer.write(path)
    assert read(path)[0] == [("First page\nSecond (page)", str(path))]
    writer.encrypt("secret")
    writer.write(path)
    with pytest.raises(UserError, match=r"a\.pdf: not a PDF that can be read"):
        read(path)


def test_books_and_dumps_are_read_by_name_and_passed_over_in_folders(tmp_path):
    (tmp_path / "a.xml").write_text("<rss/>")
    (tmp_path / "b.txt").write_text("text")
    counts = Counter()
    assert [d.text for d in read_documents(DataConfig(path=(str(tmp_path),)), counts)] == ["text"]
    assert counts["unknown_files"] == 1
    pytest.importorskip("mwparserfromhell", reason="needs the extra `collect`")
    for given in ("a.xml", "*.xml"):
        with pytest.raises(UserError, match=r"a\.xml: its first element is <rss>"):
            list(read_documents(DataConfig(path=(str(tmp_path / given),)), Counter()))


@pytest.fixture
def repository(tmp_path):
    if not shutil.which("git"):
        pytest.skip("needs the program git")
    folder = tmp_path / "repo"
    files = {
        "b.py": b"code = 1\n",
        "sub/a b.md": "\ufeff# é\n".encode(),
        "c.bin": b"\x89\0\0",
        "node_modules/x.js": b"x",
        "latin.txt": b"caf\xe9",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "link.py").symlink_to("b.py")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    (folder / "b.py").write_text("not committed")
    return folder


def git(folder, *words: str) -> None:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.org")
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, env=os.environ | {"HOME": str(folder)})


def test_a_repository_gives_the_text_of_its_last_commit(repository):
    data = DataConfig(path=(f"git:{repository}",), invalid_utf8="skip")
    counts = Counter()
    found = [(d.text, d.where) for d in read_documents(data, counts)]
    assert found == [("code = 1\n", f"git:{repository}:b.py"), ("# é\n", f"git:{repository}:sub/a b.md")]
    passed_over = {"unknown_files": 1, "vendored_files": 1, "binary_files": 1, "invalid_utf8_skipped": 1}
    assert counts == {"read": 2, **passed_over}
    only = dataclasses.replace(data, git_endings=(".md",))
    assert [d.text for d in read_documents(only, Counter())] == ["# é\n"]
    before = source_fingerprint(data)
    git(repository, "commit", "-qam", "second")
    assert source_fingerprint(data) != before
    with pytest.raises(UserError, match="not a git repository with a commit"):
        list(read_documents(DataConfig(path=(f"git:{repository.parent}",)), Counter()))


def test_no_program_that_a_repository_names_is_run(repository, tmp_path):
    """A partial clone fetches what it lacks from an address that may be a command."""
    git(repository, "config", "uploadpack.allowFilter", "true")
    clone, planted = tmp_path / "clone", tmp_path / "planted"
    git(repository, "clone", "-q", "--no-checkout", "--filter=blob:none", f"file://{repository}", str(clone))
    git(clone, "config", "remote.origin.url", f"ext::sh -c touch% {planted}")
    git(clone, "config", "protocol.ext.allow", "always")
    with pytest.raises(UserError, match="git cannot read this file"):
        list(read_documents(DataConfig(path=(f"git:{clone}",)), Counter()))
    assert not planted.exists()


@pytest.fixture
def memory():
    fsspec = pytest.importorskip("fsspec", reason="needs the extra `fsspec`")
    system = fsspec.filesystem("memory")
    system.pipe({"/corpus/b.txt": b"two", "/corpus/a.jsonl.gz": gzip.compress(b'{"text": "one"}\n')})
    system.pipe({"/corpus/.hidden.txt": b"no", "/corpus/c.png": b"no", "/corpus/sub/d.parquet": parquet("three")})
    yield system
    system.rm("/corpus", recursive=True)


def parquet(text: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), sink)
    return sink.getvalue().to_pybytes()


def test_files_behind_an_address_are_read_like_others(memory, tmp_path):
    counts = Counter()
    data = DataConfig(path=("memory://corpus",))
    found = [(d.text, d.where) for d in read_documents(data, counts)]
    names = ["memory:///corpus/a.jsonl.gz:1", "memory:///corpus/b.txt", "memory:///corpus/sub/d.parquet:1"]
    assert found == list(zip(["one", "two", "three"], names, strict=True))
    assert counts == {"read": 3, "unknown_files": 1}
    assert [d.text for d in read_documents(DataConfig(path=("memory://corpus/*.txt",)), Counter())] == ["two"]
    prepared = prepare(data, TokenizerConfig(kind="bytes"), tmp_path, report=lambda _: None)
    sheet = json.loads((prepared.folder / "data_report.json").read_text())
    assert [source["bytes"] for source in sheet["sources"]][1] == 3
    before = source_fingerprint(data)
    memory.pipe("/corpus/b.txt", b"four")
    assert source_fingerprint(data) != before
    with pytest.raises(UserError, match="no such file"):
        list(read_documents(DataConfig(path=("memory://elsewhere/x.txt",)), Counter()))


def test_credentials_are_refused_in_addresses_and_removed_from_errors(memory, monkeypatch):
    for address in ("s3://KEYID:hunter22@bucket/a.txt", "https://a.org/a.txt?X-Amz-Signature=hunter22"):
        with pytest.raises(UserError, match="leave them out") as error:
            DataConfig(path=(address,))
        assert "hunter22" not in str(error.value)
    assert DataConfig(path=("s3://bucket/part-?.txt",)).path
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22")
    monkeypatch.setitem(importlib.import_module("fsspec.config").conf, "s3", {"client": {"token": "configured-secret"}})

    def refuse(*_args, **_options):
        raise RuntimeError("denied: hunter22, configured-secret,\nhttps://me:word@a.org/x?sig=abc of 'x'")

    for name in ("info", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), name, refuse)
            with pytest.raises(UserError, match=r"memory://.*denied: ") as error:
                list(read_documents(DataConfig(path=("memory://corpus/b.txt",)), Counter()))
        for secret in ("hunter22", "configured-secret", "word", "abc"):
            assert secret not in str(error.value)


def test_a_field_inside_another_one_is_named_with_dots(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": {"text": "inner"}, "text": "outer"}\n{"body.text": "literal"}\n')
    documents, _ = read(tmp_path / "a.jsonl", text_field="body.text")
    assert [text for text, _ in documents] == ["inner", "literal"]
    with pytest.raises(UserError, match=r"a\.jsonl:1: no field 'body\.nothing' \(data\.text_field\)"):
        read(tmp_path / "a.jsonl", text_field="body.nothing")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": [{"text": "é"}]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", text_field="body.text")[0][0][0] == "é"


def test_unreadable_files_stop_or_are_counted_and_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"te')
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two")[:-4])
    (tmp_path / "c.txt").write_text("three")
    data = DataConfig(path=(str(tmp_path),))
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        list(read_documents(data, Counter()))
    counts = Counter()
    data = dataclasses.replace(data, unreadable_files="skip")
    assert [d.text for d in read_documents(data, counts)] == ["one", "three"]
    assert (counts["read"], counts["unreadable_files"]) == (2, 2)
    named = [line for line in counted(counts) if line.startswith("unreadable: ")]
    assert [name in line for name, line in zip(("a.jsonl:2", "b.txt.gz: ends too early"), named, strict=True)]


def test_every_reader_counts_what_it_reads_and_what_it_leaves_out(tmp_path, repository):
    """Items of the files = documents read + what the reader counted; `prepare` holds the rest to its own sum."""
    bad = b"caf\xe9"
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3)).encode()
    mails = b"".join(b"From a@b\nSubject: s\n\n" + body + b"\n\n" for body in (b"one", bad, b"two"))
    pages = [record("warcinfo", b"x"), record("conversion", b"one"), record("conversion", bad)]
    files = {
        "a.txt": (b"text", 1),
        "b.md": (bad, 1),
        "a.jsonl": (rows + b'{"text": "' + bad + b'"}\n', 4),
        "a.csv": (b"id,text\n1,one\n2," + bad + b"\n", 2),
        "a.tsv": (b"id\ttext\n1\tone\n2\t" + bad + b"\n", 2),
        "a.parquet": (parquet("one"), 1),
        "a.conll": (b"a\tB\n\n" * 70, 3),
        "a.mbox": (mails, 3),
        "a.warc": (b"".join(pages), 3),
        "c.bin": (b"", 1),
    }
    for name, (content, _) in files.items():
        (tmp_path / "corpus" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "corpus" / name).write_bytes(content)
    paths, items = [str(tmp_path / "corpus"), f"git:{repository}"], sum(n for _, n in files.values()) + 6
    if importlib.util.find_spec("mwparserfromhell"):
        (tmp_path / "a.xml").write_text(DUMP)
        paths, items = [*paths, str(tmp_path / "a.xml")], items + 4
    if importlib.util.find_spec("selectolax"):
        write_epub(tmp_path / "a.epub", {"a": "<p>One</p>"}, ["a"])
        paths, items = [*paths, str(tmp_path / "a.epub")], items + 1
    data = DataConfig(path=tuple(paths), invalid_utf8="skip", drop_duplicates=True, min_characters=4)
    dataset = prepare(data, TokenizerConfig(kind="bytes"), tmp_path, report=lambda _: None).dataset
    counts = dict(dataset.manifest["counts"])
    assert counts["invalid_utf8_skipped"] == 7
    by_reader = {"unknown_files", "invalid_utf8_skipped", "other_records", "other_pages"}
    by_reader |= {"vendored_files", "binary_files"}
    assert counts["read"] + sum(counts.get(name, 0) for name in by_reader) == items
    left_out = {name: n for name, n in counts.items() if leaves_out(name)}
    assert set(left_out) == {"duplicate", "short"}
    assert counts["read"] == dataset.train.n_documents + dataset.validation.n_documents + sum(left_out.values())
