import gzip
import json
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gptjax.config.data import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.tasks.registry import parse, read_examples
from gptjax.text.conll import SENTENCES
from gptjax.text.formats import read_file
from gptjax.text.rows import read_dataset_rows, read_rows

ROWS = [{"text": "cheap, now", "label": "spam"}, {"text": 'a "note"\nof two lines', "label": "ham"}]
CLASSIFY, TAG, INSTRUCT = (TaskConfig(kind=kind) for kind in ("classify", "tag", "instruct"))


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def values(path, **options) -> list[dict]:
    return [row.values for row in read_rows([str(path)], "data.path", DataConfig(path=(str(path),), **options))]


def test_every_format_gives_the_same_rows(tmp_path):
    table = 'text,label\n"cheap, now",spam\n"a ""note""\nof two lines",ham\n'
    assert values(write(tmp_path, "a.jsonl", jsonl(ROWS))) == ROWS
    assert values(write(tmp_path, "a.jsonl.gz", gzip.compress(jsonl(ROWS).encode()))) == ROWS
    assert values(write(tmp_path, "a.csv", table)) == ROWS
    tabs = write(tmp_path, "a.tsv", table.replace(",", "\t").replace("cheap\t", "cheap,"))
    assert values(tabs, quoting="double") == ROWS
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == ROWS


def test_a_datasets_classes_get_their_names(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["ham", "spam"]))
    rows = {"text": ["a", "b"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    found = [row.values["label"] for row in read_dataset_rows(DataConfig(hf_dataset=str(tmp_path)))]
    assert found == ["spam", "ham"]


def test_conll_is_sentences_of_words_and_tags(tmp_path):
    path = write(tmp_path, "a.conll", "\nThe\tX\tat\ndog\tX\tnn\n\n\nRun\tX\tvb\n")
    rows = list(read_rows([str(path)], "data.path"))
    assert [row.values for row in rows] == [
        {"tokens": ["The", "dog"], "tags": ["at", "nn"]},
        {"tokens": ["Run"], "tags": ["vb"]},
    ]
    assert rows[1].where == f"{path}:6"


def test_conll_is_text_to_pretrain_on(tmp_path):
    path = write(tmp_path, "a.conll", "The\tat\ndog\tnn\n\n" * (SENTENCES + 1))
    documents = list(read_file(path, DataConfig(), {}))
    assert [d.text for d in documents] == ["The dog\n" * SENTENCES, "The dog\n"]
    assert documents[1].where == f"{path}:{3 * SENTENCES + 1}"


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        (CLASSIFY, "a.jsonl", '{"text": "a", "label": "x"}\n{"text": " ", "label": "y"}\n', "a.jsonl:2: .*empty text"),
        (CLASSIFY, "a.jsonl", '{"text": "a"}\n', r"a.jsonl:1: no field 'label' \(task.label_field\); it has 'text'"),
        (CLASSIFY, "a.jsonl", '{"txt": "a", "label": 1}\n', r"a.jsonl:1: no field 'text'.*Did you mean 'txt'\?"),
        (CLASSIFY, "a.jsonl", '{"text": "a", "label": [[]]}\n', r"a.jsonl:1: field 'label' holds \[\]"),
        (CLASSIFY, "a.tsv", '"text"\t"label"\n"a"\t"x"\n', "a.tsv:2: no field 'text' .* data.quoting=double"),
        (CLASSIFY, "a.csv", "text;label\na;x\n", "a.csv:2: no field 'text' .* separated by commas"),
        (CLASSIFY, "a.jsonl", '{"text": null, "label": "x"}\n', "a.jsonl:1: field 'text' is null"),
        (CLASSIFY, "a.jsonl", '{"text": "a", "label": 1.5}\n', "a.jsonl:1: field 'label' holds 1.5"),
        (CLASSIFY, "a.jsonl", '{"text": "a", "label": ["x", "x"]}\n', "a.jsonl:1: .*names a label twice"),
        (CLASSIFY, "a.jsonl", '{"text": 3, "label": "x"}\n', "a.jsonl:1: field 'text' is a int, must be a string"),
        (CLASSIFY, "a.jsonl", '{"text": "a", "la', "a.jsonl:1: not valid JSON: .*truncated"),
        (CLASSIFY, "a.jsonl", "[]\n", "a.jsonl:1: a list, must be an object"),
        (CLASSIFY, "a.csv", "text,label\na\n", "a.csv:2: 1 fields, must be 2 as in the header"),
        (CLASSIFY, "a.txt", "a", "ending '.txt' is not one of .jsonl"),
        (TAG, "a.conll", "a\tx\nb\tx\ty\n", "a.conll:2: 3 columns, must be 2 as in the first line"),
        (TAG, "a.conll", "a\n", r"a.conll:1: no field 'tags' \(task.tags_field\); it has 'tokens'"),
        (TAG, "a.jsonl", '{"tokens": ["a"], "tags": []}\n', "a.jsonl:1: 1 words in 'tokens', 0 in 'tags'"),
        (TAG, "a.jsonl", '{"tokens": "a", "tags": ["x"]}\n', "a.jsonl:1: field 'tokens' is a str, must be a list"),
        (TAG, "a.jsonl", '{"tokens": [], "tags": []}\n', "a.jsonl:1: field 'tokens' has no word"),
        (INSTRUCT, "a.jsonl", '{"prompt": "a"}\n', "a.jsonl:1: no field 'response'"),
        (INSTRUCT, "a.jsonl", '{"prompt": "a", "response": 1}\n', "a.jsonl:1: a message of 'response' is a int"),
        (INSTRUCT, "a.jsonl", '{"messages": ["a"]}\n', "a.jsonl:1: field 'messages' must be a list of {role, content}"),
        (INSTRUCT, "a.jsonl", '{"messages": [{"content": "a"}]}\n', "a.jsonl:1: a message of 'messages' has no role"),
        (INSTRUCT, "a.jsonl", '{"messages": null}\n', "a.jsonl:1: field 'messages' has no message"),
        (
            INSTRUCT,
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}\n',
            "a.jsonl:1: no message of role ass",
        ),
    ],
)
def test_a_wrong_row_is_named(tmp_path, task, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as error:
        list(parse(read_rows([str(path)], "data.path"), task, DataConfig()))
    assert "\n" not in str(error.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "a.jsonl", "")
    with pytest.raises(UserError, match=r"a.json: no such file or folder.* Did you mean 'a.jsonl'\?"):
        list(read_rows([str(tmp_path / "a.json")], "data.path"))


def examples(tmp_path, train, validation, **task):
    paths = [write(tmp_path, f"{n}.jsonl", jsonl(rows)) for n, rows in (("train", train), ("validation", validation))]
    config = TaskConfig(kind="classify", validation_path=(str(paths[1]),), **task)
    return read_examples(config, DataConfig(path=(str(paths[0]),)))


def test_labels_are_those_of_the_training_rows(tmp_path):
    found = examples(tmp_path, ROWS, ROWS[:1])
    assert (found.labels, found.multi_label) == (("ham", "spam"), False)
    assert examples(tmp_path, ROWS, ROWS, labels=("spam", "ham")).labels == ("spam", "ham")
    numbers = [{"text": "a", "label": 0}, {"text": "b", "label": True}]
    assert examples(tmp_path, numbers, numbers).labels == ("0", "true")


def test_lists_of_labels_make_the_task_multi_label(tmp_path):
    several = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}]
    found = examples(tmp_path, several, several)
    assert (found.labels, found.multi_label) == (("x", "y"), True)
    assert examples(tmp_path, ROWS, ROWS, multi_label=True).multi_label


def test_labels_that_cannot_be_learned_are_refused(tmp_path):
    unseen = [{"text": "c", "label": "spams"}]
    with pytest.raises(UserError, match=r"validation.jsonl:1: label 'spams' is unseen .*Did you mean 'spam'\?"):
        examples(tmp_path, ROWS, unseen)
    with pytest.raises(UserError, match=r"task.labels: 'eggs' has no training row"):
        examples(tmp_path, ROWS, ROWS, labels=("ham", "spam", "eggs"))
    with pytest.raises(UserError, match=r"train.jsonl:1: label 'spam' is unseen"):
        examples(tmp_path, ROWS, ROWS, labels=("ham",))
    with pytest.raises(UserError, match=r"the training rows have 1 label\(s\): 'ham'; two are needed"):
        examples(tmp_path, ROWS[1:], ROWS[1:])


def test_rows_are_held_out_by_their_text(tmp_path):
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(200)]
    data = DataConfig(path=(str(write(tmp_path, "a.jsonl", jsonl(rows))),), validation_fraction=0.2)
    found = read_examples(CLASSIFY, data)
    held = {example.text for example in found.validation}
    assert 20 < len(held) < 60 and len(found.train) + len(held) == 200
    fewer = read_examples(CLASSIFY, DataConfig(path=data.path, validation_fraction=0.2, max_documents=100))
    assert {example.text for example in fewer.validation} <= held
    with pytest.raises(UserError, match="1 rows to train on and 0 to validate on"):
        read_examples(CLASSIFY, DataConfig(path=data.path, max_documents=1))


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (TaskConfig(kind="classify", label_field="tag"), {"body": "a", "tag": "x"}),
        (TaskConfig(kind="tag", tokens_field="words", tags_field="pos"), {"words": ["a"], "pos": ["x"]}),
        (TaskConfig(kind="instruct", prompt_field="q", response_field="a"), {"q": "1", "a": "2"}),
        (TaskConfig(kind="instruct", messages_field="chat"), {"chat": [{"role": "assistant", "content": "2"}]}),
    ],
)
def test_fields_have_the_names_that_the_config_gives(tmp_path, task, row):
    path = write(tmp_path, "a.jsonl", jsonl([row]))
    [named] = parse(read_rows([str(path)], "data.path"), task, DataConfig(text_field="body"))
    usual = TaskConfig(kind=task.kind)
    with pytest.raises(UserError, match=r"a.jsonl:1: no field"):
        list(parse(read_rows([str(path)], "data.path"), usual, DataConfig()))
    assert named.where == f"{path}:1"


# --- one reader for text and for rows ---------------------------------------------------------------------------

LABELLED = [{"text": f"café {n} 日本", "label": "ab"[n % 2]} for n in range(6)]


def content_of(ending: str, rows=LABELLED, newline: str = "\n", encoding: str = "utf-8") -> bytes:
    """A file of rows with the fields "text" and "label", without a character that needs quotes."""
    if ending == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    elif ending == ".conll":
        lines = [line for row in rows for line in (*(f"{word}\t{row['label']}" for word in row["text"].split()), "")]
    else:
        glue = "," if ending == ".csv" else "\t"
        lines = [f"text{glue}label", *(f"{row['text']}{glue}{row['label']}" for row in rows)]
    return "".join(line + newline for line in lines).encode(encoding)


def texts(path, **options) -> list[str]:
    return [document.text for document in read_file(path, DataConfig(path=(str(path),), **options), Counter())]


LINES = pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".conll"])


@LINES
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_any_line_end_and_a_byte_order_mark_give_the_same_rows_and_texts(tmp_path, ending, newline):
    plain = write(tmp_path, f"plain{ending}", content_of(ending))
    other = write(tmp_path, f"other{ending}", b"\xef\xbb\xbf" + content_of(ending, newline=newline))
    assert values(other) == values(plain) and len(values(plain)) == len(LABELLED)
    assert texts(other) == texts(plain) and any("café 1" in text for text in texts(plain))


@LINES
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252"])
def test_an_encoding_can_be_named(tmp_path, ending, encoding):
    rows = LABELLED if encoding == "utf-16" else [row | {"text": row["text"][:6]} for row in LABELLED]
    plain = write(tmp_path, f"plain{ending}", content_of(ending, rows))
    other = write(tmp_path, f"other{ending}.gz", gzip.compress(content_of(ending, rows, encoding=encoding)))
    assert values(other, encoding=encoding) == values(plain)
    assert texts(other, encoding=encoding) == texts(plain)
    with pytest.raises(UserError, match=rf"other{ending}.gz:\d: byte 0x.. at offset \d+ is not UTF-8 .*data.encoding"):
        values(other)


def test_text_that_is_not_in_the_named_encoding_is_named(tmp_path):
    path = write(tmp_path, "a.csv", b"text,label\nab\x81,x\n")
    with pytest.raises(UserError, match=r"a.csv:2: the character at offset 2 is not valid cp1252 \(data.encoding\)"):
        values(path, encoding="cp1252")
    assert values(path, encoding="cp1252", invalid_utf8="replace") == [{"text": "ab\ufffd", "label": "x"}]
    path = write(tmp_path, "b.csv", "text,label\nab,x\n".encode("utf-16")[:-1])
    with pytest.raises(UserError, match=r"b.csv: cannot be read: not valid utf-16: truncated data"):
        values(path, encoding="utf-16")


@LINES
def test_blank_lines_change_nothing(tmp_path, ending):
    lines = content_of(ending).splitlines(keepends=True)
    spaced = b"\n \n" + b"\n".join(lines) + b"\n\n"
    if ending == ".conll":  # between words a blank line ends the sentence
        spaced = b"\n \n" + b"".join(lines).replace(b"\n\n", b"\n\n\n \n") + b"\n\n"
    plain, other = write(tmp_path, f"a{ending}", content_of(ending)), write(tmp_path, f"b{ending}", spaced)
    assert values(other) == values(plain) and texts(other) == texts(plain)


@LINES
def test_a_bad_byte_is_named_replaced_or_left_out_with_its_row(tmp_path, ending):
    content = content_of(ending)
    parts = content.split("café".encode())
    bad = "café".encode().join(parts[:4]) + b"caf\xe9" + "café".encode().join(parts[4:])
    path, counts = write(tmp_path, f"a{ending}", bad), Counter()
    with pytest.raises(UserError, match=rf"a{ending}:\d+: byte 0xe9 at offset \d+ is not UTF-8.*invalid_utf8"):
        values(path)

    def read(policy: str) -> list[dict]:
        data = DataConfig(path=(str(path),), invalid_utf8=policy)
        return [row.values for row in read_rows([str(path)], "data.path", data, counts)]

    plain = values(write(tmp_path, f"b{ending}", content))
    assert read("skip") == plain[:3] + plain[4:]
    replaced = read("replace")
    assert (
        "\ufffd" in json.dumps(replaced[3], ensure_ascii=False) and replaced[:3] + replaced[4:] == plain[:3] + plain[4:]
    )
    assert counts == {"invalid_utf8_skipped": 1, "invalid_utf8_replaced": 1}


def test_a_bad_byte_in_the_header_is_named_or_replaced(tmp_path):
    path = write(tmp_path, "a.csv", b"caf\xe9,text\n1,a\n")
    with pytest.raises(UserError, match=r"a.csv:1: byte 0xe9 at offset 3 is not UTF-8"):
        values(path)
    for policy in ("skip", "replace"):
        assert values(path, invalid_utf8=policy) == [{"caf\ufffd": "1", "text": "a"}]


def test_half_a_surrogate_pair_in_a_row_follows_the_policy(tmp_path):
    lines = [r'{"text": "a", "label": "x"}', r'{"text": "b \ud83d", "label": "y"}']
    path = write(tmp_path, "a.jsonl", "\n".join([*lines, r'{"text": "\ud83d\ude42", "label": "\udc41"}', ""]))
    with pytest.raises(UserError, match=r"a.jsonl:2: U\+D83D at character 2 is half of a surrogate pair"):
        values(path)
    assert [row["text"] for row in values(path, invalid_utf8="skip")] == ["a"]
    replaced = values(path, invalid_utf8="replace")
    assert replaced[1:] == [{"text": "b \ufffd", "label": "y"}, {"text": "🙂", "label": "\ufffd"}]
    assert texts(path, invalid_utf8="skip") == ["a", "🙂"], "of a document, only the text counts"


def test_tabs_have_no_quotes_unless_they_are_asked_for(tmp_path):
    path = write(tmp_path, "a.tsv", 'text\tlabel\n"open\tx\nclosed"\ty\n"whole"\tz\n')
    assert [row["text"] for row in values(path)] == ['"open', 'closed"', '"whole"']
    path = write(tmp_path, "b.csv", 'text,label\n"a, b",x\n')
    assert values(path) == [{"text": "a, b", "label": "x"}]
    path = write(tmp_path, "c.csv", 'text,label\nsay "x,y\n')
    assert values(path, quoting="none") == [{"text": 'say "x', "label": "y"}]
    with pytest.raises(UserError, match=r"c2.csv:3: not valid CSV: unexpected end of data .*data.quoting=none"):
        values(write(tmp_path, "c2.csv", 'text,label\nx,y\n"open,z\n'))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label,text\na,x,b\n", r"a.csv:1: column 'text' is there twice \(columns 1 and 3\)"),
        ("a.tsv", b"text\tlabel\ttext\na\tx\tb\n", r"a.tsv:1: column 'text' is there twice \(columns 1 and 3\)"),
        (
            "a.jsonl",
            b'{"text": "a", "label": "x"}\n{"text": "a", "text": "b"}\n',
            "a.jsonl:2: key 'text' is there twice",
        ),
        ("a.jsonl", b'{"text": "a", "more": {"k": 1, "k": 2}}\n', "a.jsonl:1: key 'k' is there twice"),
    ],
)
def test_two_fields_of_one_name_are_one_error_in_every_reader(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    for read in (values, texts):
        with pytest.raises(UserError, match=message):
            read(path)


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for read in (values, texts):
        with pytest.raises(UserError, match=r"a.parquet: column 'text' is there twice"):
            read(tmp_path / "a.parquet")


def test_columns_without_a_name_get_one(tmp_path):
    path = write(tmp_path, "a.csv", "v1,v2,,\nham,hello,x,\n")
    assert values(path) == [{"v1": "ham", "v2": "hello", "column_3": "x", "column_4": ""}]


TEXT_TYPES = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_every_string_type_of_arrow_is_read(tmp_path, kind):
    column = pyarrow.array(["é one", "two", None]).cast(TEXT_TYPES[kind] if kind != "dictionary" else pyarrow.string())
    column = column.dictionary_encode() if kind == "dictionary" else column
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [{"text": t, "n": n} for n, t in enumerate(["é one", "two", None], 1)]
    pyarrow.parquet.write_table(pyarrow.table({"text": column.slice(0, 2)}), tmp_path / "b.parquet")
    assert texts(tmp_path / "b.parquet") == ["é one", "two"]


def test_bad_bytes_in_parquet_are_named_also_inside_lists(tmp_path):
    bad = pyarrow.array([b"ok", b"b\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    nested = pyarrow.ListArray.from_arrays([0, 1, 2], bad)
    for column, where in ((bad, "a.parquet:2: byte 0xff at offset 1"), (nested, "a.parquet:2: byte 0xff at offset 1")):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=where):
            values(tmp_path / "a.parquet")
        assert len(values(tmp_path / "a.parquet", invalid_utf8="skip")) == 1
        assert "b\ufffd" in str(values(tmp_path / "a.parquet", invalid_utf8="replace")[1])
    chats = [[{"role": "user", "content": "é"}], None]
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "c.parquet")
    assert values(tmp_path / "c.parquet") == [{"messages": messages} for messages in chats]


def test_unicode_and_newlines_apply_to_rows(tmp_path):
    row = {"text": "e\u0301\r\nx", "label": "e\u0301"}
    path = write(tmp_path, "a.jsonl", jsonl([row]))
    [example] = parse(read_rows([str(path)], "data.path"), CLASSIFY, DataConfig(unicode="NFC", newlines="unix"))
    assert (example.text, example.labels) == ("é\nx", ("é",))
    [example] = parse(read_rows([str(path)], "data.path"), CLASSIFY, DataConfig())
    assert (example.text, example.labels) == (row["text"], (row["label"],))


def test_rows_come_from_folders_and_patterns_in_the_order_given(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("b", "a"):
        write(tmp_path / "folder", f"{name}.jsonl", jsonl([{"text": name}]))
    write(tmp_path / "folder", "x.png", "")
    write(tmp_path, "0.jsonl", jsonl([{"text": "0"}]))
    counts = Counter()
    for given in (str(tmp_path / "folder"), str(tmp_path / "folder" / "*")):
        rows = read_rows([given, str(tmp_path / "0.jsonl")], "data.path", None, counts)
        assert [row.values["text"] for row in rows] == ["a", "b", "0"]
    assert counts["unknown_files"] == 2


# --- labels that are missing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, "", " ", -1, -100, -1.0, float("nan"), "-1", "-1.0", "NaN", [None], [-1]])
def test_a_label_that_stands_for_none_is_left_out_and_counted(tmp_path, missing):
    rows = [{"text": f"t{n}", "label": missing if n % 3 == 0 else n % 3} for n in range(9)]
    found = examples(tmp_path, rows, rows)
    assert found.labels == ("1", "2") and len(found.train) == 6
    assert found.notes[0].startswith("6 left out: without a label")
    if missing in (-1, "-1"):
        assert examples(tmp_path, rows, rows, labels=("-1", "1", "2")).labels == ("-1", "1", "2")
    with pytest.raises(UserError, match=r"have 1 label\(s\): '1'; two are needed \(.* left out: without a label"):
        examples(tmp_path, [row for row in rows if row["label"] != 2], rows)


@pytest.mark.parametrize("sign", ["-", "?", "N/A", "null"])
def test_a_sign_for_no_label_is_left_out_where_there_are_two_other_labels(tmp_path, sign):
    rows = [{"text": f"t{n}", "label": ("a", "b", sign)[n % 3]} for n in range(9)]
    found = examples(tmp_path, rows, rows)
    assert found.labels == ("a", "b") and (len(found.train), len(found.validation)) == (6, 6)
    assert found.notes[0].startswith("6 left out: the label is a sign for none")
    assert found == examples(tmp_path, rows, rows, labels=("a", "b"))
    assert examples(tmp_path, rows, rows, labels=("a", "b", sign)).labels == ("a", "b", sign)
    two = [row for row in rows if row["label"] != "b"]
    assert set(examples(tmp_path, two, two).labels) == {"a", sign}, "one of two labels is a class"
    polarities = [row | {"label": {"a": "+", "b": "-", sign: "0"}[row["label"]]} for row in rows]
    assert examples(tmp_path, polarities, polarities).labels == ("+", "-", "0")


def test_a_datasets_missing_class_is_left_out(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["ham", "spam"]))
    rows = {"text": [f"t{n}" for n in range(60)], "label": [(-1, 0, 1)[n % 3] for n in range(60)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    found = read_examples(CLASSIFY, DataConfig(hf_dataset=str(tmp_path), validation_fraction=0.3))
    assert found.labels == ("ham", "spam") and found.notes[0].startswith("20 left out")


def test_a_sentence_with_a_missing_tag_is_left_out(tmp_path):
    rows = [{"tokens": [f"a{n}", "b"], "tags": ["x", None if n % 2 else "y"]} for n in range(40)]
    path = write(tmp_path, "a.jsonl", jsonl(rows))
    found = read_examples(TAG, DataConfig(path=(str(path),), validation_fraction=0.5, max_documents=40))
    assert found.labels == ("x", "y") and found.notes[0].startswith("20 left out")


def test_lists_of_one_label_are_several_labels(tmp_path):
    rows = [{"text": f"t{n}", "label": ["xy"[n % 2]]} for n in range(4)]
    assert examples(tmp_path, rows, rows).multi_label
    plain = [row | {"label": row["label"][0]} for row in rows]
    assert not examples(tmp_path, plain, plain).multi_label


def test_equal_texts_are_never_on_both_sides_whatever_their_labels(tmp_path):
    rows = [{"text": f"t{n % 40}", "label": "xy"[n % 7 % 2]} for n in range(400)]
    path = write(tmp_path, "a.jsonl", jsonl(rows))
    found = read_examples(CLASSIFY, DataConfig(path=(str(path),), validation_fraction=0.3))
    sides = [{example.text for example in side} for side in (found.train, found.validation)]
    assert not sides[0] & sides[1] and all(len(side) > 3 for side in sides)
    assert len({example.labels for example in found.validation}) == 2


# --- CoNLL-2003 and CoNLL-U -------------------------------------------------------------------------------------

DOCSTART = "-DOCSTART- -X- -X- O\n\n"
SENTENCE = "John NNP B-NP B-PER\nruns VBZ B-VP O\n\n"
CONLLU = (
    "# newdoc id = d1\n# sent_id = 1\n# text = Allons au parc.\n1\tAllons\taller\tVERB\tV\t_\t0\troot\t_\t_\n"
    "2-3\tau\t_\t_\t_\t_\t_\t_\t_\t_\n2\tà\tà\tADP\tP\t_\t4\tcase\t_\t_\n3\tle\tle\tDET\tD\t_\t4\tdet\t_\t_\n"
    "4\tparc\tparc\tNOUN\tN\t_\t1\tobl\t_\tSpaceAfter=No\n4.1\tx\tx\tX\tX\t_\t_\t_\t_\t_\n"
    "5\t.\t.\tPUNCT\tS\t_\t1\tpunct\t_\t_\n\n# sent_id = 2\n1\t#\t#\tSYM\t_\t_\t0\troot\t_\t_\n\n"
)


def test_docstart_begins_a_document_and_is_no_sentence(tmp_path):
    path = write(tmp_path, "a.conll", (DOCSTART + SENTENCE * 40) * 2)
    assert len(values(path)) == 80
    assert values(path)[0] == {"tokens": ["John", "runs"], "tags": ["B-PER", "O"]}
    assert texts(path) == ["John runs\n" * 40] * 2


@pytest.mark.parametrize("name", ["a.conll", "a.conllu"])
def test_conllu_is_read_by_its_conventions(tmp_path, name):
    path = write(tmp_path, name, CONLLU)
    rows = list(read_rows([str(path)], "data.path"))
    assert rows[0].values == {
        "tokens": ["Allons", "à", "le", "parc", "."],
        "tags": ["VERB", "ADP", "DET", "NOUN", "PUNCT"],
        "xpos": ["V", "P", "D", "N", "S"],
    }
    assert rows[1].values == {"tokens": ["#"], "tags": ["SYM"], "xpos": [None]} and rows[1].where == f"{path}:13"
    assert texts(path) == ["Allons au parc.\n#\n"]
    [tagged] = parse(rows, TaskConfig(kind="tag", tags_field="xpos"), DataConfig())
    assert tagged.tags == ("V", "P", "D", "N", "S")
    bare = write(tmp_path, "b.conll", "".join(line + "\n" for line in CONLLU.split("\n") if not line.startswith("# ")))
    assert values(bare) == [row.values for row in rows]


def test_a_hash_is_a_word_outside_of_conllu_and_comments_are_passed_over(tmp_path):
    path = write(tmp_path, "a.conll", "# id 7 domain=en x\nJohn _ _ B-PER\n# _ _ O\n\n# _ _ O\n1 _ _ O\n")
    assert [row["tokens"] for row in values(path)] == [["John", "#"], ["#", "1"]]


def test_numbered_words_in_another_format_are_refused(tmp_path):
    path = write(tmp_path, "a.conll", "1\tJohn\tNNP\n2\truns\tVBZ\n")
    with pytest.raises(UserError, match=r"a.conll:1: the first column numbers the words of a sentence"):
        values(path)
    with pytest.raises(UserError, match=r"a.conllu:1: 2 columns that begin with 'John'; CoNLL-U has 10"):
        values(write(tmp_path, "a.conllu", "John\tNNP\n"))
    with pytest.raises(UserError, match=r"b.conllu:2: 'x' is no number of a word"):
        values(write(tmp_path, "b.conllu", "1\tJohn" + "\t_" * 8 + "\nx\truns" + "\t_" * 8 + "\n"))
