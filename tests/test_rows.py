import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from gptjax.config.run import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.tasks.registry import parse, read_examples
from gptjax.text.formats import CONLL_SENTENCES, read_file
from gptjax.text.rows import read_dataset_rows, read_rows

ROWS = [{"text": "cheap, now", "label": "spam"}, {"text": 'a "note"\nof two lines', "label": "ham"}]
CLASSIFY, TAG, INSTRUCT = (TaskConfig(kind=kind) for kind in ("classify", "tag", "instruct"))


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def values(path) -> list[dict]:
    return [row.values for row in read_rows([str(path)], "data.path")]


def test_every_format_gives_the_same_rows(tmp_path):
    table = 'text,label\n"cheap, now",spam\n"a ""note""\nof two lines",ham\n'
    assert values(write(tmp_path, "a.jsonl", jsonl(ROWS))) == ROWS
    assert values(write(tmp_path, "a.jsonl.gz", gzip.compress(jsonl(ROWS).encode()))) == ROWS
    assert values(write(tmp_path, "a.csv", table)) == ROWS
    assert values(write(tmp_path, "a.tsv", table.replace(",", "\t").replace("cheap\t", "cheap,"))) == ROWS
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
    path = write(tmp_path, "a.conll", "The\tat\ndog\tnn\n\n" * (CONLL_SENTENCES + 1))
    documents = list(read_file(path, DataConfig(), {}))
    assert [d.text for d in documents] == ["The dog\n" * CONLL_SENTENCES, "The dog\n"]
    assert documents[1].where == f"{path}:{3 * CONLL_SENTENCES + 1}"


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        (CLASSIFY, "a.jsonl", '{"text": "a", "label": "x"}\n{"text": " ", "label": "y"}\n', "a.jsonl:2: .*empty text"),
        (CLASSIFY, "a.jsonl", '{"text": "a"}\n', "a.jsonl:1: no field 'label'; set task.label_field"),
        (CLASSIFY, "a.jsonl", '{"txt": "a", "label": 1}\n', r"a.jsonl:1: no field 'text'.*Did you mean 'txt'\?"),
        (CLASSIFY, "a.jsonl", '{"text": "a", "label": null}\n', "a.jsonl:1: field 'label' is null"),
        (CLASSIFY, "a.jsonl", '{"text": "a", "label": 1.5}\n', "a.jsonl:1: field 'label' holds 1.5"),
        (CLASSIFY, "a.jsonl", '{"text": "a", "label": ["x", "x"]}\n', "a.jsonl:1: .*names a label twice"),
        (CLASSIFY, "a.jsonl", '{"text": 3, "label": "x"}\n', "a.jsonl:1: field 'text' is a int, must be a string"),
        (CLASSIFY, "a.jsonl", '{"text": "a", "la', "a.jsonl:1: not valid JSON: .*truncated"),
        (CLASSIFY, "a.jsonl", "[]\n", "a.jsonl:1: a list, must be an object"),
        (CLASSIFY, "a.csv", "text,label\na\n", "a.csv:2: 1 fields, must be 2 as in the header"),
        (CLASSIFY, "a.txt", "a", "rows are read from files that end in one of .jsonl"),
        (TAG, "a.conll", "a\tx\nb\tx\ty\n", "a.conll:2: 3 columns, must be 2 as in the first line"),
        (TAG, "a.conll", "a\n", "a.conll:1: 1 column, must be at least 2"),
        (TAG, "a.jsonl", '{"tokens": ["a"], "tags": []}\n', "a.jsonl:1: 1 words in 'tokens', 0 in 'tags'"),
        (TAG, "a.jsonl", '{"tokens": "a", "tags": ["x"]}\n', "a.jsonl:1: field 'tokens' is a str, must be a list"),
        (TAG, "a.jsonl", '{"tokens": [], "tags": []}\n', "a.jsonl:1: field 'tokens' has no word"),
        (INSTRUCT, "a.jsonl", '{"prompt": "a"}\n', "a.jsonl:1: no field 'response'"),
        (INSTRUCT, "a.jsonl", '{"prompt": "a", "response": ""}\n', "a.jsonl:1: a message needs a role and a content"),
        (INSTRUCT, "a.jsonl", '{"messages": ["a"]}\n', "a.jsonl:1: field 'messages' must be a list of {role, content}"),
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
    with pytest.raises(UserError, match=r"no such file. Did you mean 'a.jsonl'\?"):
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


def test_chats_and_prompts_are_one_form(tmp_path):
    messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    rows = [{"prompt": "1+1", "response": "2"}, {"messages": messages}]
    path = write(tmp_path, "a.jsonl", jsonl(rows))
    task = TaskConfig(kind="instruct", template="<{role}>{content}|")
    first, second = parse(read_rows([str(path)], "data.path"), task, DataConfig())
    assert first.pieces == second.pieces == (("<user>", False), ("1+1|", False), ("<assistant>", False), ("2|", True))


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
