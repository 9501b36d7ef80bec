"""Hostile text, damaged files and names that lead elsewhere: what goes through, and what is named."""

import dataclasses
import gzip
import io
import itertools
import json
import random
import sys

import pytest
import zstandard

from gptjax.config.data import DataConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.text.prepare import prepare
from gptjax.text.tokenizer import make_tokenizer
from tests.faults.inputs import accepted, refused, write_config

KINDS = {
    "bytes": TokenizerConfig(kind="bytes"),
    "chars": TokenizerConfig(kind="chars"),
    "bpe": TokenizerConfig(kind="bpe", vocab_size=300),
    "gpt2": TokenizerConfig(),
}
PLAIN = ["an ordinary text", "and another one, é 中"]
HOSTILE = {
    "a million spaces": " " * 10**6,
    "a million a": "a" * 10**6,
    "a million newlines": "\n" * 10**6,
    "a million combining accents": "\u0301" * 10**6,
    "NUL": "a\0b\0\0",
    "CRLF and lone CR": "a\r\nb\rc\n\r",
    "BOM inside": "a\ufeffb",
    "end of text in words": "<|endoftext|>x<|endoftext|>",
    "last code point": "\U0010ffff\ufffe\uffff",
    "right-to-left and zero-width": "\u202eabc\u200b\u2066",
}


def stored_texts(tmp_path, paths, kind: TokenizerConfig, **options) -> list[str]:
    data = dataclasses.replace(DataConfig(path=tuple(map(str, paths))), **options)
    _, dataset, tokenizer = prepare(data, kind, tmp_path / "cache", report=lambda _: None)
    texts = []
    for split in (dataset.train, dataset.validation):
        starts = [*split.document_starts(0, split.n_tokens).tolist(), split.n_tokens - 1]
        texts += [tokenizer.decode(split.slice(a + 1, b)) for a, b in itertools.pairwise(starts)]
    return texts


def tokenizer_config(kind: str) -> TokenizerConfig:
    if kind == "gpt2":
        try:
            make_tokenizer(KINDS[kind], lambda: [])
        except UserError as error:
            pytest.skip(f"needs the vocabulary of gpt2 (TIKTOKEN_CACHE_DIR): {error}")
    return KINDS[kind]


@pytest.mark.fault(40, "NUL, CRLF, byte order marks and the like inside texts", "go through byte for byte")
@pytest.mark.fault(41, "a million spaces, a million a, a million newlines", "go through byte for byte")
@pytest.mark.parametrize(
    "kind", ["bytes", "chars", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bpe", "gpt2"))]
)
def test_hostile_text_goes_through(tmp_path, seen, kind):
    texts = [*PLAIN, *HOSTILE.values()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert sorted(stored_texts(tmp_path, [tmp_path / "a.jsonl"], tokenizer_config(kind))) == sorted(texts)
    seen(f"{kind}: {len(HOSTILE)} hostile texts come back byte for byte")


@pytest.mark.fault(41, "one document of 50 MB on one line", "goes through byte for byte")
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_document_of_50_megabytes(tmp_path, seen, kind):
    text = "".join(random.Random(0).choices(["ab", "c ", "def", " ", "xyzxyz"], k=200_000)) * 90
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + '\n{"text": "a short one, é"}\n')
    assert len(text) > 40e6
    assert sorted(stored_texts(tmp_path, [tmp_path / "a.jsonl"], tokenizer_config(kind)), key=len)[1] == text
    seen(f"{kind}: {len(text) / 1e6:.0f} MB come back byte for byte")


INVALID = {
    "a.txt": b"good\xff",
    "a.jsonl": b'{"text": "good\xff"}\n',
    "surrogate.jsonl": b'{"text": "good\\ud800"}\n',
    "a.csv": b"text\ngood\xff\n",
}


@pytest.mark.fault(
    40, "bytes that are no UTF-8, half surrogates in JSON", "by policy: named with file and row, replaced, skipped"
)
@pytest.mark.parametrize("name", INVALID)
def test_invalid_utf8(tmp_path, capsys, seen, name):
    (tmp_path / name).write_bytes(INVALID[name])
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PLAIN))
    config = write_config(tmp_path, tmp_path / name, tmp_path / "plain.jsonl")
    line = refused(capsys, "prepare", config)
    assert f"{name}:" in line and "data.invalid_utf8 to replace or skip" in line
    replaced = accepted(capsys, "prepare", config, "--data.invalid_utf8", "replace")
    assert "3 documents" in replaced and "1 with bytes replaced" in replaced
    skipped = accepted(capsys, "prepare", config, "--data.invalid_utf8", "skip")
    assert "2 documents" in skipped and "1 left out: not UTF-8" in skipped
    seen(line.replace(str(tmp_path), ""))


@pytest.mark.fault(
    40, "a byte order mark at the start, CRLF line ends", "the mark is taken off; line ends by data.newlines"
)
def test_byte_order_mark_and_line_ends(tmp_path, seen):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    (tmp_path / "b.txt").write_bytes(b"three")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert set(stored_texts(tmp_path, paths, KINDS["bytes"])) == {"one\r\ntwo\r", "three"}
    assert set(stored_texts(tmp_path, paths, KINDS["bytes"], newlines="unix")) == {"one\ntwo\n", "three"}
    seen("kept by default, LF with data.newlines=unix")


ROWS = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(200)).encode()
BROKEN_FILES = {
    "row without the field": ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "a.jsonl:2: no field 'text'"),
    "text that is a number": ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: field 'text' is a int"),
    "last line cut": ("a.jsonl", ROWS[:-5], "a.jsonl:200: not valid JSON"),
    "gzip cut": ("a.jsonl.gz", gzip.compress(ROWS)[:-20], "a.jsonl.gz: ends too early"),
    "zstd cut": ("a.jsonl.zst", zstandard.compress(ROWS)[:-4], "a.jsonl.zst: ends too early"),
    "gzip with a flipped byte": (
        "a.jsonl.gz",
        gzip.compress(ROWS)[:-6] + b"\0" * 6,
        "a.jsonl.gz: not a valid .gz file",
    ),
    "renamed column": ("a.csv", b"body\nx\n", "a.csv:1: no field 'text'"),
    "row of other length": ("a.csv", b"text,n\nx,1\ny\n", "a.csv:3: 1 fields, must be 2"),
    "no parquet": ("a.parquet", b"PAR1" + bytes(50) + b"PAR1", "a.parquet: "),
    "folder with the ending of a file": ("a.txt", None, "no file ends in"),
}


@pytest.mark.fault(44, "JSONL or CSV rows without text, cut lines, cut .gz and .zst", "file and row are named")
@pytest.mark.parametrize("fault", BROKEN_FILES)
def test_broken_file(tmp_path, capsys, seen, fault):
    name, content, message = BROKEN_FILES[fault]
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    line = refused(capsys, "prepare", write_config(tmp_path, tmp_path / name))
    assert message in line
    assert not list((tmp_path / "cache").rglob("*.bin")), "nothing is left"
    seen(line.replace(str(tmp_path), ""))


CORPORA = {
    "no document": (39, b"", "a.jsonl", (), "no text: 0 documents were read"),
    "only empty documents": (39, b'{"text": ""}\n' * 9, "a.jsonl", (), "no text: 9 documents were read (9 left out"),
    "one character": (42, b"a", "a.txt", (), "the only document has 1 characters"),
    "equal documents": (42, b'{"text": "a"}\n' * 9, "a.jsonl", (), "all 9 documents are equal"),
    "empty validation split": (42, ROWS, "a.jsonl", ("--data.validation_fraction", "1e-9"), "leaves no document for"),
}


@pytest.mark.fault(39, "no document, or only empty ones", "refused: says how many were read and left out")
@pytest.mark.parametrize("fault", [name for name, corpus in CORPORA.items() if corpus[0] == 39])
def test_corpus_of_nothing(tmp_path, capsys, seen, fault):
    _check_corpus(tmp_path, capsys, seen, fault)


@pytest.mark.fault(
    42, "a corpus shorter than one sequence, an empty validation split", "refused, with the nearest that does"
)
@pytest.mark.parametrize("fault", [name for name, corpus in CORPORA.items() if corpus[0] == 42])
def test_corpus_too_small(tmp_path, capsys, seen, fault):
    _check_corpus(tmp_path, capsys, seen, fault)


@pytest.mark.fault(
    42, "a corpus shorter than one sequence, an empty validation split", "refused, with the nearest that does"
)
def test_corpus_shorter_than_a_sequence(tmp_path, capsys, seen):
    (tmp_path / "a.txt").write_text("twenty-two characters.")
    line = refused(capsys, "train", write_config(tmp_path, tmp_path / "a.txt"))
    assert "fewer than one window of model.block_size=32" in line and "block_size is 20" in line
    seen(line)


def _check_corpus(tmp_path, capsys, seen, fault):
    _, content, name, flags, message = CORPORA[fault]
    (tmp_path / name).write_bytes(content)
    line = refused(capsys, "prepare", write_config(tmp_path, tmp_path / name), *flags)
    assert message in line
    seen(line.replace(str(tmp_path), ""))


NAMES = ["../../etc/passwd", "/etc/passwd", "~/x", "~nobody-here/x", "https://example.org/x", "file:///etc", "a\0b"]


@pytest.mark.fault(45, "names that lead elsewhere: .., absolute, ~, addresses, NUL, links", "refused by name")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["hf_dataset", "path"])
def test_name_that_leads_elsewhere(tmp_path, capsys, seen, option, name):
    config = write_config(tmp_path, "unused")
    text, unused = config.read_text(), "  path:\n  - unused\n"
    assert unused in text and "hf_dataset: ''" in text
    if option == "path":
        text = text.replace(unused, f"  path: {json.dumps([name])}\n")
    else:
        text = text.replace(unused, "").replace("hf_dataset: ''", f"hf_dataset: {json.dumps(name)}")
    config.write_text(text)
    line = refused(capsys, "prepare", config)
    assert f"data.{option}" in line
    seen(line.replace(str(tmp_path), ""))


@pytest.mark.fault(45, "names that lead elsewhere: .., absolute, ~, addresses, NUL, links", "refused by name")
def test_link_out_of_its_folder(tmp_path, capsys, seen, monkeypatch):
    secret, corpus = tmp_path / "secret", tmp_path / "corpus"
    secret.mkdir()
    corpus.mkdir()
    (secret / "a.txt").write_text("secret")
    (corpus / "b.txt").write_text("text")
    (corpus / "inside.txt").symlink_to(corpus / "b.txt")
    for link, target in (("a.txt", secret / "a.txt"), ("more", secret)):
        (corpus / link).symlink_to(target)
        line = refused(capsys, "prepare", write_config(tmp_path, corpus))
        assert f"{corpus / link}: a link that leads out of its folder" in line
        line = refused(capsys, "prepare", write_config(tmp_path, hf_dataset=str(corpus)))
        assert f"{corpus / link}: a link that leads out" in line
        (corpus / link).unlink()
    (tmp_path / "work/owner").mkdir(parents=True)
    (tmp_path / "work/owner/name").symlink_to(secret)
    monkeypatch.chdir(tmp_path / "work")
    link_line = refused(capsys, "prepare", write_config(tmp_path, hf_dataset="owner/name"))
    assert "leads out of the working folder" in link_line
    seen(line.replace(str(tmp_path), ""))


@pytest.mark.fault(45, "trust_remote_code as a key, a flag or in a name", "refused: a data set's own code is never run")
def test_trust_remote_code(tmp_path, capsys, seen):
    config = write_config(tmp_path, hf_dataset="owner/name:trust_remote_code=True")
    lines = [refused(capsys, "prepare", config)]
    lines.append(refused(capsys, "prepare", config, "--data.trust_remote_code", "true"))
    config.write_text("data: {trust_remote_code: true}\n")
    lines.append(refused(capsys, "prepare", config))
    assert all("trust_remote_code" in line for line in lines)
    script = tmp_path / "set"
    script.mkdir()
    (script / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    lines.append(refused(capsys, "prepare", write_config(tmp_path, hf_dataset=str(script))))
    assert not (tmp_path / "ran").exists()
    seen("; ".join(line.replace(str(tmp_path), "") for line in lines[:3]))


@pytest.mark.fault(40, "standard input and prompts that are no UTF-8", "one line")
def test_prompt_that_is_no_utf8(tmp_path, capsys, seen, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    line = refused(capsys, "sample", "--run_dir", tmp_path)
    assert "standard input: the prompt cannot be read" in line
    assert "prompt 1 is not UTF-8" in refused(capsys, "sample", "--run_dir", tmp_path, "--prompt", "a\udcff")
    seen(line)
