import csv
import gzip
import io
import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from gptjax.config.data import DataConfig
from gptjax.errors import UserError
from gptjax.text.formats import ENDINGS
from gptjax.text.hub import parse_spec
from gptjax.text.paths import find_files
from gptjax.text.sources import read_documents, source_fingerprint

TEXTS = ["plain", "line\r\nbreaks\nkept\rhere", 'quotes " and, commas', "emoji 🙂 中文 e\u0301", "NUL \0 inside", " "]


def read(counts: Counter | None = None, **options) -> list[str]:
    return [
        document.text for document in read_documents(DataConfig(**options), Counter() if counts is None else counts)
    ]


def encode_rows(ending: str, texts: list[str]) -> bytes:
    if ending == ".jsonl":
        return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    if ending == ".csv":
        file = io.StringIO(newline="")
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
        return file.getvalue().encode()
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), sink)
    return sink.getvalue().to_pybytes()


def compress(compression: str, content: bytes) -> bytes:
    if compression == ".gz":
        return gzip.compress(content)
    if compression == ".zst":  # two frames, as pzstd writes
        half = len(content) // 2
        return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))
    return content


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_every_row_format_gives_back_its_texts(tmp_path, ending, compression):
    path = tmp_path / f"a{ending}{compression}"
    path.write_bytes(compress(compression, encode_rows(ending, TEXTS)))
    assert read(path=(str(path),)) == TEXTS


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("ending", [".txt", ".md", ".py"])
def test_every_text_format_is_one_document_without_its_byte_order_mark(tmp_path, ending, compression):
    text = "".join(TEXTS)
    path = tmp_path / f"a{ending}{compression}"
    path.write_bytes(compress(compression, b"\xef\xbb\xbf" + text.encode()))
    assert read(path=(str(path),)) == [text]


def test_a_row_larger_than_any_buffer_is_read_whole(tmp_path):
    texts = ["ab\n" * 700_000, "last"]
    for ending in (".jsonl", ".csv"):
        path = tmp_path / f"a{ending}.zst"
        path.write_bytes(compress(".zst", encode_rows(ending, texts)))
        assert read(path=(str(path),)) == texts


@pytest.mark.parametrize(("ending", "content"), [(".jsonl", '{"text":"x"}\n'), (".csv", '"text",id\nx,1\n')])
def test_byte_order_mark_does_not_hide_a_field(tmp_path, ending, content):
    path = tmp_path / f"a{ending}"
    path.write_text(content, encoding="utf-8-sig")
    assert read(path=(str(path),)) == ["x"]


def test_folder_is_read_sorted_once_without_hidden_files_and_counts_the_others(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.md", ".hidden.txt", ".git/c.txt", "image.png", "a/data.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    counts = Counter()
    given = [str(tmp_path), str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]
    found = find_files(given, "data.path", ENDINGS, counts)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/y.md", "a/z.txt", "b.txt"]
    assert counts["unknown_files"] == 2


def test_max_documents_stops_reading(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(encode_rows(".jsonl", ["a", "b"]) + b"not json\n")
    assert read(path=(str(tmp_path),), max_documents=2) == ["a", "b"]


FAULTS = {
    "missing field": ("a.jsonl", b'{"text":"x"}\n{"txt":"y"}\n', "a.jsonl:2: no field 'text'", "'txt'"),
    "number for text": ("a.jsonl", b'{"text":1}\n', "a.jsonl:1: field 'text' is a int", "string"),
    "null for text": ("a.jsonl", b'{"text":null}\n', "a.jsonl:1: field 'text' is null", "string"),
    "list for a row": ("a.jsonl", b"[1]\n", "a.jsonl:1: a list", "object"),
    "truncated line": ("a.jsonl", b'{"text":"x"}\n{"text":"y', "a.jsonl:2: not valid JSON", "truncated"),
    "deep nesting": ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: not valid JSON", ""),
    "lone surrogate": ("a.jsonl", b'{"text":"x\\ud800"}\n', "a.jsonl:1: U+D800 at character 1", "invalid_utf8"),
    "bad byte in a line": ("a.jsonl", b'{"text":"x"}\n{"text":"\xff"}\n', "a.jsonl:2: byte 0xff at offset 9", "UTF-8"),
    "bad byte in a text": ("a.txt", b"abc\xfe", "a.txt: byte 0xfe at offset 3", "invalid_utf8"),
    "UTF-16": ("a.txt", "hello".encode("utf-16"), "a.txt: byte 0xff at offset 0", "UTF-16"),
    "missing column": ("a.csv", b"id,body\n1,x\n", "a.csv:1: no field 'text'", "'body'"),
    "short row": ("a.csv", b"id,text\n1\n", "a.csv:2: 1 fields, must be 2", "header"),
    "comma without quotes": ("a.csv", b"id,text\n1,a, b\n", "a.csv:2: 3 fields, must be 2", "quotes"),
    "open quote": ("a.csv", b'id,text\n1,"abc\n', "not valid CSV", "truncated"),
    "bad byte in a cell": ("a.csv", b"id,text\n1,\xff\n", "a.csv:2: byte 0xff at offset 0", "UTF-8"),
    "no parquet": ("a.parquet", b"PAR1 no PAR1", "a.parquet: not a valid parquet file", ""),
    "no parquet column": ("a.parquet", encode_rows(".parquet", []), "a.parquet: column 'text' has type null", "string"),
    "truncated gzip": ("a.txt.gz", gzip.compress(b"abc" * 100)[:-9], "a.txt.gz: ends too early", "truncated"),
    "truncated zstd": ("a.txt.zst", compress(".zst", b"abc" * 100)[:-2], "a.txt.zst: ends too early", "truncated"),
    "truncated zstd rows": (
        "a.jsonl.zst",
        compress(".zst", b'{"text":"x"}\n' * 99)[:-1],
        "a.jsonl.zst: ends too early",
        "truncated",
    ),
    "empty gzip": ("a.txt.gz", b"", "a.txt.gz: ends too early", "truncated"),
    "no gzip": ("a.txt.gz", b"plain text", "a.txt.gz: not a valid .gz file", ""),
    "no zstd": ("a.txt.zst", b"plain text", "a.txt.zst: not a valid .zst file", ""),
    "unknown ending": ("a.json", b"{}", "ending '.json' is not one of", "'.jsonl'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_file_is_one_line_that_names_place_and_remedy(tmp_path, fault):
    name, content, place, remedy = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path=(str(tmp_path / name),))
    message = str(error.value)
    assert place in message and remedy in message and "\n" not in message


def test_corpus_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "corpus.txt").touch()
    with pytest.raises(UserError, match=r"corpis\.txt.*Did you mean 'corpus\.txt'"):
        read(path=(str(tmp_path / "corpis.txt"),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file ends in"):
        read(path=(str(tmp_path / "empty"),))
    with pytest.raises(UserError, match=r"set one of data\.path"):
        read()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_invalid_utf8_is_replaced_or_left_out_and_counted(tmp_path, name):
    content = {"a.txt": b"x\xff", "a.jsonl": b'{"text":"x\xff"}\n', "a.csv": b"text\nx\xff\n"}[name]
    (tmp_path / name).write_bytes(content)
    counts = Counter()
    assert read(counts, path=(str(tmp_path),), invalid_utf8="replace") == ["x\ufffd"]
    assert read(counts, path=(str(tmp_path),), invalid_utf8="skip") == []
    assert counts["invalid_utf8_replaced"] == counts["invalid_utf8_skipped"] == 1


def test_lone_surrogate_follows_the_same_policy(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text":"x\\ud800"}\n{"text":"\\ud83d\\ude42"}\n')
    assert read(path=(str(tmp_path),), invalid_utf8="replace") == ["x\ufffd", "🙂"]
    assert read(path=(str(tmp_path),), invalid_utf8="skip") == ["🙂"]


def test_standard_library_is_a_few_megabytes_in_the_same_order_every_time():
    documents = list(read_documents(DataConfig(source="python-stdlib"), Counter()))
    again = list(read_documents(DataConfig(source="python-stdlib"), Counter()))
    assert documents == again
    assert 200 < len(documents) < 2000
    assert 3e6 < sum(len(document.text) for document in documents) < 3e7
    assert not any("site-packages" in document.where or "/test/" in document.where for document in documents)


def test_fingerprint_changes_with_content_files_and_source(tmp_path):
    data = DataConfig(path=(str(tmp_path),))
    (tmp_path / "a.txt").write_text("a")
    prints = [source_fingerprint(data)]
    assert source_fingerprint(data) == prints[0]
    (tmp_path / "a.txt").write_text("ab")
    prints.append(source_fingerprint(data))
    (tmp_path / "b.txt").write_text("b")
    prints.append(source_fingerprint(data))
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    prints.append(source_fingerprint(data))
    prints.append(source_fingerprint(DataConfig(source="python-stdlib")))
    assert len(set(prints)) == len(prints)


@pytest.fixture
def no_progress_bars(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_from_a_local_folder_gives_its_split(tmp_path, no_progress_bars, streaming):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(encode_rows(".jsonl", TEXTS))
    (folder / "test.jsonl").write_bytes(encode_rows(".jsonl", ["held out"]))
    assert read(hf_dataset=str(folder), streaming=streaming) == TEXTS
    assert read(hf_dataset=f"{folder}@test", streaming=streaming) == ["held out"]
    data = DataConfig(hf_dataset=str(folder), streaming=streaming)
    assert source_fingerprint(data) == source_fingerprint(data)
    with pytest.raises(UserError, match="no field 'body'"):
        read(hf_dataset=str(folder), streaming=streaming, text_field="body")
    with pytest.raises(UserError, match="cannot be read") as error:
        read(hf_dataset=f"{folder}@nowhere", streaming=streaming)
    assert "\n" not in str(error.value)


def test_dataset_spec_is_cut_into_name_config_and_split():
    assert parse_spec("owner/name") == ("owner/name", None, "train")
    assert parse_spec("wikitext:wikitext-2-v1@test[:1%]") == ("wikitext", "wikitext-2-v1", "test[:1%]")


@pytest.mark.parametrize(
    "spec",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "/no/such/folder",
        "~/corpus",
        "https://example.org/x",
        "s3://bucket/x",
        "a\0b",
        "a/b/c",
        "name:x:y",
        "name:trust_remote_code=True",
        "@train",
    ],
)
def test_dataset_spec_that_could_mean_another_place_is_refused(spec):
    with pytest.raises(UserError, match=r"data\.hf_dataset"):
        parse_spec(spec)


def test_relative_paths_are_found_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert find_files(["a.txt"], "data.path", ENDINGS, Counter()) == [Path("a.txt")]
