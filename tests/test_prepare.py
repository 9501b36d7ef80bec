import dataclasses
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptjax.config.clean import CleanConfig
from gptjax.config.data import DataConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.text import prepare as module
from gptjax.text import write_shards
from gptjax.text.prepare import describe, prepare
from gptjax.text.split import choose_split
from gptjax.text.tokenizer import make_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
BYTES = TokenizerConfig(kind="bytes")
TEXTS = [f"document {i} " + "lorem ipsum é\r\n" * (i % 7) for i in range(300)]


def quiet(_line: str) -> None: ...


@pytest.fixture
def corpus(tmp_path) -> DataConfig:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataConfig(path=(str(path),))


def documents_of(split, tokenizer) -> list[str]:
    starts = [*split.document_starts(0, split.n_tokens).tolist(), split.n_tokens - 1]
    return [tokenizer.decode(split.slice(a + 1, b)) for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_shards_hold_every_document_once_on_one_side(corpus, tmp_path, kind):
    config = TokenizerConfig(kind=kind, **({"vocab_size": 300} if kind == "bpe" else {}))
    _, dataset, tokenizer = prepare(corpus, config, tmp_path, report=quiet)
    sides = [documents_of(split, tokenizer) for split in (dataset.train, dataset.validation)]
    assert sorted(sides[0] + sides[1]) == sorted(TEXTS)
    assert 10 < len(sides[1]) < 60
    for split, texts in zip((dataset.train, dataset.validation), sides, strict=True):
        assert split.n_bytes == sum(len(text.encode()) for text in texts)
        assert split.n_documents == len(texts)
        assert split.slice(split.n_tokens - 1, split.n_tokens) == split.end_of_text == tokenizer.end_of_text


def test_batches_do_not_show_in_the_result(corpus, tmp_path, monkeypatch):
    whole = prepare(corpus, BYTES, tmp_path / "a", report=quiet)
    monkeypatch.setattr(write_shards, "BATCH_CHARACTERS", 100)
    assert prepare(corpus, BYTES, tmp_path / "b", report=quiet).dataset.hash == whole.dataset.hash


def test_shakespeare_is_split_as_the_field_does(tmp_path):
    path = DATA / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    data = DataConfig(path=(str(path),))
    _, dataset, tokenizer = prepare(data, TokenizerConfig(kind="chars"), tmp_path, report=quiet)
    assert (dataset.train.n_tokens, dataset.validation.n_tokens) == (1_003_854, 111_540)
    assert tokenizer.vocab_size == 65
    text = path.read_text()
    assert tokenizer.decode(dataset.train.slice(0, 1_003_854)) == text[: int(len(text) * 0.9)]
    assert tokenizer.decode(dataset.validation.slice(0, 111_540)) == text[int(len(text) * 0.9) :]


def test_second_preparation_reads_nothing(corpus, tmp_path, monkeypatch):
    first = prepare(corpus, BYTES, tmp_path, report=quiet)
    monkeypatch.setattr(module, "read_documents", lambda *_: pytest.fail("read again"))
    for data in (corpus, dataclasses.replace(corpus, attend_across_documents=True)):
        second = prepare(data, BYTES, tmp_path, report=pytest.fail)
        assert second.folder == first.folder
        assert second.dataset.hash == first.dataset.hash
        assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


OTHER_OPTIONS = {
    "text_field": "body",
    "template": "{text} {body}",
    "max_documents": 200,
    "validation_fraction": 0.2,
    "encoding": "latin-1",
    "quoting": "none",
    "invalid_utf8": "skip",
    "unicode": "NFC",
    "newlines": "unix",
    "min_characters": 30,
    "drop_duplicates": True,
    "clean": CleanConfig(personal_data=("email",), workers=1),
    "license": "MIT",
    "unreadable_files": "skip",
}


def test_every_option_that_changes_tokens_makes_another_folder(corpus, tmp_path):
    Path(corpus.path[0]).write_text("".join(json.dumps({"text": text, "body": text[::-1]}) + "\n" for text in TEXTS))
    kept_elsewhere = {"path", "source", "hf_dataset", "streaming", "attend_across_documents", "verify", "skip"}
    kept_elsewhere |= {"packing", "git_endings"}  # the latter is for repositories alone
    assert {field.name for field in dataclasses.fields(DataConfig)} == set(OTHER_OPTIONS) | kept_elsewhere
    configs = [dataclasses.replace(corpus, **{name: value}) for name, value in OTHER_OPTIONS.items()]
    made = [prepare(data, BYTES, tmp_path, report=quiet) for data in (corpus, *configs)]
    made.append(prepare(corpus, TokenizerConfig(kind="chars"), tmp_path, report=quiet))
    made.append(prepare(corpus, TokenizerConfig(kind="bpe", vocab_size=258), tmp_path, report=quiet))
    assert len({prepared.folder for prepared in made}) == len(made)
    os.utime(corpus.path[0], ns=(1, 1))
    assert prepare(corpus, BYTES, tmp_path, report=quiet).folder not in {prepared.folder for prepared in made}


def test_options_that_came_later_leave_older_folders_usable(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "source_fingerprint", lambda _: "0" * 32)
    folder, _ = module.find_folder(DataConfig(path=("a.txt",)), BYTES, tmp_path)
    assert folder.name == "a.txt-36a355a6fb324be2"  # as the version before data.encoding named it


def test_another_runs_tokenizer_is_used_instead(corpus, tmp_path):
    tokenizer = make_tokenizer(TokenizerConfig(kind="chars"), lambda: [*TEXTS, "Ω"])
    own = prepare(corpus, TokenizerConfig(kind="chars"), tmp_path, report=quiet)
    other = prepare(corpus, TokenizerConfig(kind="chars"), tmp_path, report=quiet, tokenizer_override=tokenizer)
    assert other.tokenizer.fingerprint == tokenizer.fingerprint != own.tokenizer.fingerprint
    assert other.folder != own.folder
    narrow = make_tokenizer(TokenizerConfig(kind="chars"), lambda: ["document 0123456789"])
    with pytest.raises(UserError, match=r"corpus\.jsonl:2: character 'l'"):
        prepare(corpus, BYTES, tmp_path, report=quiet, tokenizer_override=narrow)


def test_bpe_does_not_learn_from_what_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("ab " * 900 + "xyz" * 100)
    data = DataConfig(path=(str(tmp_path / "a.txt"),))
    tokenizer = prepare(data, TokenizerConfig(kind="bpe", vocab_size=300), tmp_path, report=quiet).tokenizer
    assert len(tokenizer.encode("ab")) == 1 and len(tokenizer.encode("xyz")) == 3


@pytest.mark.parametrize("n", [2, 3, 10, 64])
def test_few_documents_always_leave_some_for_both_sides(n):
    texts = [f"text {i}" for i in range(n)]
    for fraction in (0.001, 0.1, 0.5, 0.999):
        split = choose_split(texts, fraction)
        sides = [split(text)[0][0] for text in texts]
        held_out = sides.count("validation")
        assert held_out == min(n - 1, max(1, round(n * fraction)))


def test_side_of_a_document_does_not_depend_on_the_others():
    texts = [f"text {i}" for i in range(2000)]
    split, again = choose_split(texts, 0.1), choose_split(texts[500:], 0.1)
    assert all(split(text) == again(text) for text in texts)
    assert 150 < sum(split(text)[0][0] == "validation" for text in texts) < 250


def test_equal_documents_are_never_on_both_sides():
    split = choose_split(["a", "a", "b", "a"], 0.5)
    assert {split("a")[0][0], split("b")[0][0]} == {"train", "validation"}
    with pytest.raises(UserError, match="all 3 documents are equal"):
        choose_split(["a", "a", "a"], 0.5)


FAULTS = {
    "no document": ({"a.jsonl": "\n"}, {}, "no text: 0 documents were read"),
    "only empty documents": ({"a.txt": "", "b.txt": ""}, {}, r"no text: 2 documents were read \(2 left out: empty"),
    "only short documents": ({"a.txt": "abc"}, {"min_characters": 9}, r"\(1 left out: too short"),
    "one character": ({"a.txt": "a"}, {}, "the only document has 1 characters"),
    "nothing held out": (
        {"a.jsonl": "".join(f'{{"text":"t{i}"}}\n' for i in range(100))},
        {"validation_fraction": 1e-6},
        r"data\.validation_fraction=1e-06 leaves no document for validation of 100 .* does: 0\.0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_corpus_without_two_sides_is_refused_and_leaves_nothing(tmp_path, fault):
    files, options, message = FAULTS[fault]
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        prepare(DataConfig(path=(str(folder),), **options), BYTES, tmp_path / "cache", report=quiet)
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache" / "data").iterdir() if path.suffix != ".lock"]


def test_nearest_fraction_in_the_error_works(tmp_path):
    (tmp_path / "a.jsonl").write_text(FAULTS["nothing held out"][0]["a.jsonl"])
    for fraction in (1e-6, 0.9999999):
        data = DataConfig(path=(str(tmp_path / "a.jsonl"),), validation_fraction=fraction)
        with pytest.raises(UserError) as error:
            prepare(data, BYTES, tmp_path, report=quiet)
        nearest = float(str(error.value).rsplit(" ", 1)[1])
        prepare(dataclasses.replace(data, validation_fraction=nearest), BYTES, tmp_path, report=quiet)


def test_full_disk_is_one_line_and_leaves_nothing(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write_shards.ShardWriter, "_write", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(corpus, BYTES, tmp_path, report=quiet)
    assert [path.suffix for path in (tmp_path / "data").iterdir()] == [".lock"]


def test_cache_that_is_a_file_is_named(corpus, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="cache_dir: cannot write"):
        prepare(corpus, BYTES, tmp_path / "cache", report=quiet)


@pytest.mark.parametrize("name", ["train-00000.bin", "manifest.json", "tokenizer.json"])
def test_damaged_folder_is_told_and_made_anew(corpus, tmp_path, name):
    first = prepare(corpus, BYTES, tmp_path, report=quiet)
    path = first.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    told = []
    second = prepare(corpus, BYTES, tmp_path, report=told.append)
    assert name in told[0] and "damaged" in told[0]
    assert second.folder == first.folder and second.dataset.hash == first.dataset.hash


def test_source_that_changes_while_it_is_read_is_refused(corpus, tmp_path, monkeypatch):
    prints = iter(["before", "after"])
    monkeypatch.setattr(module, "source_fingerprint", lambda _: next(prints))
    with pytest.raises(UserError, match="changed while"):
        prepare(corpus, BYTES, tmp_path, report=quiet)


def test_summary_counts_what_was_left_out(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["a", "", "b", "a", "cc"]))
    (folder / "x.png").touch()
    prepared = prepare(DataConfig(path=(str(folder),), drop_duplicates=True), BYTES, tmp_path / "cache", report=quiet)
    text = describe(prepared)
    assert "5 documents, 0.0 MB, 9 tokens (" in text
    for part in ("1 left out: empty", "1 left out: duplicates", "1 files of other kinds"):
        assert part in text


SCRIPT = """
import sys, time
from pathlib import Path
from gptjax.config.clean import CleanConfig
from gptjax.config.data import DataConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.text import write_shards
from gptjax.text.prepare import prepare
write_shards.REPORT_SECONDS = 0
write_shards.BATCH_CHARACTERS = 1000
lines = []
def report(line):
    print(line, flush=True)
    lines.append(line)
    if len(lines) == int(sys.argv[3]):
        time.sleep(60)
data = DataConfig(path=(sys.argv[1],))
print(prepare(data, TokenizerConfig(kind="bytes"), Path(sys.argv[2]), report=report).dataset.hash)
"""


def start(corpus: DataConfig, cache: Path, stop_after: int) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, corpus.path[0], str(cache), str(stop_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("stop_after", [1, 10])
def test_killed_preparation_leaves_nothing_that_looks_finished(corpus, tmp_path, stop_after):
    with start(corpus, tmp_path / "cache", stop_after) as process:
        assert process.stdout
        for _ in range(stop_after):
            assert process.stdout.readline().startswith("preparing")
        process.send_signal(signal.SIGKILL)
    left = [path.name for path in (tmp_path / "cache" / "data").iterdir()]
    assert len(left) == 2 and not list((tmp_path / "cache").rglob("manifest.json"))
    again = prepare(corpus, BYTES, tmp_path / "cache", report=quiet)
    unbroken = prepare(corpus, BYTES, tmp_path / "other", report=quiet)
    assert again.dataset.hash == unbroken.dataset.hash
    for split in ("train", "validation"):
        a, b = getattr(again.dataset, split), getattr(unbroken.dataset, split)
        assert np.array_equal(a.slice(0, a.n_tokens), b.slice(0, b.n_tokens))
    assert not list((tmp_path / "cache" / "data").glob("*.tmp*"))


def test_two_processes_at_once_prepare_one_folder(corpus, tmp_path):
    with start(corpus, tmp_path, -1) as one, start(corpus, tmp_path, -1) as two:
        outputs = [process.communicate()[0].splitlines() for process in (one, two)]
    assert one.returncode == two.returncode == 0
    assert outputs[0][-1] == outputs[1][-1]
    builders = [any(line.startswith("preparing") for line in lines) for lines in outputs]
    assert builders.count(True) == 1
    assert len(list((tmp_path / "data").glob("*/manifest.json"))) == 1
