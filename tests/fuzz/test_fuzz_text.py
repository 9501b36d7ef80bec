"""Corpus files: each is read as the documents that it holds, or refused in one line that names it."""

import csv
import functools
import gzip
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import zstandard
from hypothesis import strategies as st

from gptjax.config.data import DataConfig
from gptjax.errors import UserError
from gptjax.text.hub import parse_spec
from gptjax.text.rows import read_rows
from gptjax.text.sources import read_documents
from gptjax.text.tokenizer import make_tokenizer, tokenizer_from_json
from gptjax.text.tokenizers.base import tokenizer_to_json
from tests.fuzz.fuzz import EDITS, ODD_TEXT, ODD_VALUE, ends_well, fuzz, mutate, refusals

TEXT = st.one_of(st.text(max_size=20), ODD_TEXT, st.sampled_from(["a,b", '"', 'say "x"', "a\nb", "\r\n", "\ufeff"]))
POLICY = st.sampled_from(["error", "replace", "skip"])
ENDING = st.sampled_from([".txt", ".jsonl", ".csv", ".tsv", ".parquet", ".conll", ".conllu"])
ENCODING = st.sampled_from(["utf-8", "utf-8", "utf-16", "latin-1", "cp1252"])
PACKED = {"": bytes, ".gz": functools.partial(gzip.compress, mtime=0), ".zst": zstandard.compress}


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="gptjax-fuzz-"))


def read(name: str, content: bytes, policy: str = "error") -> list[str] | None:
    """The texts of a file, all of them encodable; None where it was refused."""
    path = folder() / name
    path.write_bytes(content)
    counts: Counter[str] = Counter()
    try:
        texts = [d.text for d in read_documents(DataConfig(path=(str(path),), invalid_utf8=policy), counts)]
    except UserError as error:
        ends_well(error)
        assert name in str(error)
        return None
    finally:
        path.unlink()
    for text in texts:
        text.encode()
    assert counts["read"] == len(texts)
    return texts


def read_values(name: str, content: bytes, policy: str, encoding: str) -> list[dict] | None:
    """The rows of a file, all of them encodable; None where it was refused."""
    path = folder() / name
    path.write_bytes(content)
    data = DataConfig(path=(str(path),), invalid_utf8=policy, encoding=encoding)
    try:
        rows = list(read_rows([str(path)], "data.path", data))
    except UserError as error:
        ends_well(error)
        assert name in str(error)
        return None
    finally:
        path.unlink()
    assert all(row.where.startswith(str(path)) for row in rows)
    json.dumps([row.values for row in rows], ensure_ascii=False, default=str).encode()
    return [row.values for row in rows]


def has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


@fuzz(150, ENDING, st.sampled_from(sorted(PACKED)), st.binary(max_size=100), POLICY)
def test_any_bytes_as_a_corpus(ending, compression, content, policy):
    read(f"a{ending}{compression}", PACKED[compression](content), policy)
    read(f"a{ending}{compression}", content, policy)


@fuzz(200, ENDING.filter(lambda ending: ending != ".txt"), st.binary(max_size=100), POLICY, ENCODING)
def test_any_bytes_as_rows(ending, content, policy, encoding):
    read_values(f"a{ending}", content, policy, encoding)


CELLS = st.lists(st.sampled_from(["1", "2", "1-2", "1.1", "#", "x", "_", "-DOCSTART-", "é", "10", ""]), max_size=11)
CONLL_LINES = st.lists(st.one_of(st.just(["1", *"abcdefghi"]), CELLS), max_size=8)


@fuzz(200, CONLL_LINES, st.sampled_from(["\t", " "]), st.sampled_from([".conll", ".conllu"]))
def test_lines_of_conll(lines, glue, ending):
    content = "".join(glue.join(cells) + "\n" for cells in lines).encode()
    rows = read_values(f"a{ending}", content, "error", "utf-8")
    texts = read(f"a{ending}", content)
    assert (rows is None) == (texts is None)
    for row in rows or []:
        assert row["tokens"] and ("xpos" in row or "-DOCSTART-" not in row["tokens"])
        assert all(len(values) == len(row["tokens"]) for values in row.values())


@fuzz(150, st.lists(TEXT, max_size=5), POLICY)
def test_rows_of_json_come_back(texts, policy):
    content = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()
    odd = [has_surrogate(text) for text in texts]
    found = read("a.jsonl", content, policy)
    if any(odd) and policy == "error":
        assert found is None
    elif policy == "skip":
        assert found == [text for text, is_odd in zip(texts, odd, strict=True) if not is_odd]
    else:
        assert found is not None and len(found) == len(texts)
        assert all(a == b for a, b, is_odd in zip(found, texts, odd, strict=True) if not is_odd)


@fuzz(150, st.lists(TEXT.filter(lambda text: not has_surrogate(text)), max_size=5))
def test_rows_of_csv_come_back(texts):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    assert read("a.csv", file.getvalue().encode()) == texts


@fuzz(150, st.lists(ODD_VALUE, max_size=4))
def test_rows_of_other_json(values):
    content = "".join(json.dumps(value) + "\n" for value in values).encode()
    found = read("a.jsonl", content)
    if found is not None:
        assert found == [value["text"] for value in values]


@fuzz(200, ENDING, st.sampled_from(sorted(PACKED)), EDITS, EDITS, POLICY)
def test_mutated_rows(ending, compression, edits, packed_edits, policy):
    rows = [("id", "text"), *((i, f'text {i}, "é" \n 中') for i in range(20))]
    if ending == ".csv":
        file = io.StringIO(newline="")
        csv.writer(file).writerows(rows)
        content = file.getvalue().encode()
    elif ending == ".tsv":
        content = "".join(f"{n}\t{text}\n" for n, text in [("id", "text"), (1, 'say "x'), (2, "é")]).encode()
    elif ending.startswith(".conll"):
        content = "".join(f"{n % 4 + 1}\tword{n}" + "\tX" * 8 + "\n" * (1 + (n % 4 == 3)) for n in range(20)).encode()
    elif ending == ".parquet":
        content = parquet()
    else:
        content = "".join(json.dumps({"text": text}) + "\n" for _, text in rows[1:]).encode()
    name = f"a{ending}{compression}"
    read(name, PACKED[compression](mutate(content, edits)), policy)
    read(name, mutate(PACKED[compression](content), packed_edits), policy)


@functools.cache
def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"text {i} é" for i in range(20)]}), sink)
    return sink.getvalue().to_pybytes()


@fuzz(150, st.one_of(ODD_TEXT, st.text(alphabet="ab/:@.~[]%\\-_", max_size=12)))
def test_dataset_names(spec):
    with refusals():
        name, _, _ = parse_spec(spec)
        assert ".." not in Path(name).parts and "://" not in spec


@functools.cache
def tokenizers() -> list[str]:
    from gptjax.config.tokenizer import TokenizerConfig

    kinds = (TokenizerConfig(kind="bytes"), TokenizerConfig(kind="chars"), TokenizerConfig(kind="bpe", vocab_size=270))
    return [tokenizer_to_json(make_tokenizer(kind, lambda: ["some text, é"] * 9, lambda _: None)) for kind in kinds]


@fuzz(150, st.integers(0, 2), EDITS)
def test_mutated_tokenizer_files(kind, edits):
    text = mutate(tokenizers()[kind].encode(), edits).decode("utf-8", "surrogateescape")
    with refusals():
        tokenizer = tokenizer_from_json(text, "tokenizer.json")
        ids = range(tokenizer.vocab_size)
        assert tokenizer.decode_bytes(ids) == b"".join(tokenizer.decode_bytes([i]) for i in ids)
        assert tokenizer_from_json(tokenizer_to_json(tokenizer), "again").fingerprint == tokenizer.fingerprint


@fuzz(100, st.integers(0, 2), ODD_VALUE, st.data())
def test_tokenizer_files_with_odd_values(kind, value, data):
    content = json.loads(tokenizers()[kind])
    content[data.draw(st.sampled_from(sorted(content)))] = value
    with refusals():
        tokenizer_from_json(json.dumps(content), "tokenizer.json")
