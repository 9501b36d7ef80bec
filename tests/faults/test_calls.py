"""Wrong calls of every verb: each ends with one line and status 2, and writes nothing."""

import shutil
from pathlib import Path

import pytest

from gptjax.config.reader import to_yaml
from tests.faults.inputs import BYTES, make_run, refused
from tests.test_report import write_run
from tests.tiny import replace, run_config

FILES = {"empty": b"", "list.yaml": b"- 1\n", "binary": bytes(range(256)), "text.txt": b"some words\n" * 30}
OWN = {  # what a verb cannot do without, besides a place
    "plan": ("--devices", "1", "--chip", "h100"),
    "inspect": ("--text", "ab"),
    "data": ("--step", "1"),
    "tokenizer": ("--data.path", "text.txt"),
    "import": ("--to", "new"),
    "export": ("--to", "new"),
    "profile": ("--steps", "1"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config, a run that was not trained, one without checkpoints, and files of other kinds."""
    folder = tmp_path_factory.mktemp("calls")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    make_run(folder / "run")
    write_run(folder / "record")
    config = replace(
        run_config(folder), run_dir="new", cache_dir="cache", tokenizer=BYTES, data={"path": ("text.txt",)}
    )
    (folder / "c.yaml").write_text(to_yaml(config))
    shutil.copytree(folder / "run", folder / "damaged")
    for array in (folder / "damaged" / "checkpoints").rglob("*.*"):
        if array.is_file():
            array.write_bytes(array.read_bytes()[:10])
    shutil.copytree(folder / "run", folder / "classifier")
    path = folder / "classifier" / "config.yaml"
    path.write_text(path.read_text().replace("kind: pretrain", "kind: classify", 1))
    return folder


def listing(folder: Path) -> dict[str, int]:
    """Names and sizes of all files; the cache may be filled."""
    files = [path for path in folder.rglob("*") if "cache" not in path.parts]
    return {str(path): path.stat().st_size if path.is_file() else -1 for path in files}


def call(capsys, monkeypatch, place: Path, words: tuple[str, ...]) -> str:
    """Makes a call that must be refused and write nothing; returns the line."""
    monkeypatch.chdir(place)
    before = listing(place)
    line = refused(capsys, *words)
    assert listing(place) == before
    return line


PLACES = ("nowhere", "folder", "empty", "list.yaml", "binary")
VERBS = (
    *("lr-find", "profile", "verify-resume", "plan", "sweep", "doctor", "report", "scaling-fit"),
    *("inspect", "diagnose", "data", "tokenizer", "import", "export"),
)
EMPTY_IS_A_CONFIG = ("lr-find", "profile", "verify-resume", "plan", "doctor")
"""An empty config file has the defaults, which name no text."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_of_another_kind_is_named(place, capsys, monkeypatch, verb):
    for where in PLACES:
        if where == "empty" and verb in EMPTY_IS_A_CONFIG:
            continue
        assert where in call(capsys, monkeypatch, place, (verb, where, *OWN.get(verb, ())))
    assert "'a\\x00b' is not a usable path" in call(capsys, monkeypatch, place, (verb, "a\0b", *OWN.get(verb, ())))
    unknown = call(capsys, monkeypatch, place, (verb, "c.yaml", *OWN.get(verb, ()), "--no_such_option", "1"))
    assert "unknown option --no_such_option" in unknown


HTML, NO_FOLDER = "must end in .html", "cannot be written: No such file or directory"
TEXT = ("--data.path", "text.txt")
CALLS = {
    ("lr-find", "c.yaml", "--low", "0"): "low must be above 0 and below high",
    ("lr-find", "c.yaml", "--low", "1", "--high", "1"): "low must be above 0 and below high",
    ("lr-find", "c.yaml", "--high", "nan"): "high='nan' must be a number",
    ("lr-find", "c.yaml", "--high", "inf"): "high='inf' is too large",
    ("lr-find", "c.yaml", "--steps", "9"): "steps=9 must be at least 10",
    ("lr-find", "c.yaml", "--steps", "1e3"): "steps='1e3' must be a whole number",
    ("lr-find", "c.yaml", "--steps", str(2**31)): "must be at most",
    ("lr-find", "c.yaml", "--out", "c.yaml"): HTML,
    ("lr-find", "c.yaml", "--out", "nowhere/a.html"): NO_FOLDER,
    ("lr-find", "c.yaml", "--train.num_steps", "0"): "train.num_steps=0 must be at least 1",
    ("lr-find", "c.yaml", "--data.path", "nowhere.txt"): "nowhere.txt: no such file or folder",
    ("profile", "c.yaml", "--steps", "0"): "steps=0 must be at least 1",
    ("profile", "c.yaml", "--out", "folder"): "exists already; name a new folder",
    ("profile", "c.yaml", "--out", "text.txt/trace"): "cannot be written",
    ("profile", "record", "--steps", "x"): "steps='x' must be a whole number",
    ("verify-resume", "c.yaml", "--kills", "0"): "kills=0 must be at least 1",
    ("verify-resume", "c.yaml", "--kill_seed", "-1"): "kill_seed=-1 must not be negative",
    ("verify-resume", "c.yaml", "--save_every", "0.5"): "save_every='0.5' must be a whole number",
    ("plan", "c.yaml", "--devices", "nan", "--chip", "h100"): "devices='nan' must be a whole number",
    ("plan", "c.yaml", "--devices", str(10**30), "--chip", "h100"): "is too large",
    ("doctor", "--check"): "--check needs a value",
    ("doctor", "--cache_dir", "gs://bucket/x"): "is an address",
    ("doctor", "run", "nowhere"): "nowhere: neither a config file, nor a run directory",
    ("report",): "no run is named",
    ("report", "record", "nowhere"): "nowhere: no run directory",
    ("report", "run"): "run: has no metrics.jsonl yet",
    ("report", "record", "--out", "record/metrics.jsonl"): HTML,
    ("report", "record", "--out", "nowhere/a.html"): NO_FOLDER,
    ("report", "record", "--png", "text.txt"): "png=text.txt: is a file; name a folder",
    ("scaling-fit",): "no run is named",
    ("scaling-fit", "record"): "1 finished runs: a fit needs at least 12",
    ("scaling-fit", "record", "record"): "record: is named twice",
    ("scaling-fit", "record", "--out", "c.yaml"): HTML,
    ("scaling-fit", "record", "--out", "nowhere/a.html"): NO_FOLDER,
    ("scaling-fit", "record", "--bootstrap", "0"): "bootstrap=0 must be at least 1",
    ("scaling-fit", "record", "--params", "1e9"): "give both, above 0, or none",
    ("scaling-fit", "record", "--params", "-1", "--tokens", "-1"): "give both, above 0, or none",
    ("scaling-fit", "record", "--params", "1", "--tokens", "1", "--mfu", "1.5"): "mfu=1.5 must lie in (0, 1]",
    ("scaling-fit", "record", "--params", "1", "--tokens", "1", "--price", "-1"): "price=-1.0 must not be negative",
    ("scaling-fit", "record", "--mfu", "0.5"): "mfu=0.5 has no effect without params and tokens",
    ("inspect", "run"): "text is missing",
    ("inspect", "run", "--text", ""): "text is missing",
    ("inspect", "run", "--text", "a"): "text has 1 tokens; give one of 2 to 16",
    ("inspect", "run", "--text", "a" * 17): "text has 17 tokens; give one of 2 to 16",
    ("inspect", "run", "--text", "ab", "--out", "run/config.yaml"): HTML,
    ("inspect", "run", "--text", "ab", "--out", "nowhere/a.html"): NO_FOLDER,
    ("inspect", "damaged", "--text", "ab", "--strict"): "manifest.json is damaged; without the strict option",
    ("inspect", "record", "--text", "ab"): "record: has no checkpoint yet",
    ("inspect", "run", "--text", "ab", "--base", "run"): "needs no base",
    ("diagnose", "run", "--windows", "-1"): "windows=-1 must not be negative",
    ("diagnose", "run", "--batch_size", "0"): "batch_size=0 must be at least 1",
    ("diagnose", "run", "--sample_tokens", "1e9"): "sample_tokens='1e9' must be a whole number",
    ("diagnose", "run"): "no text: set one of data.path",
    ("data", "run"): "give either --step N, from 1, or --rank_loss",
    ("data", "run", "--step", "-1"): "give either --step N, from 1, or --rank_loss",
    ("data", "run", "--step", "1", "--rank_loss"): "give either --step N, from 1, or --rank_loss",
    ("data", "run", "--step", "1", "--show", "3"): "show=3 has no effect without rank_loss",
    ("data", "run", "--step", "1001"): "step=1001 must be at most train.num_steps=1000",
    ("data", "run", "--step", "1"): "no text: set one of data.path",
    ("data", "classifier", "--step", "1"): "has task.kind=classify; only runs that pretrain have documents",
    ("tokenizer", "run"): "no text: name files as --data.path",
    ("tokenizer", "run", "--data.path", "nowhere.txt"): "nowhere.txt: no such file or folder",
    ("tokenizer", "gpt3", *TEXT): "gpt3: cannot read the tokenizer",
    ("tokenizer", "run", *TEXT, "--extend", "3"): "--extend and --prune need --to",
    ("tokenizer", "run", *TEXT, "--to", "new"): "--to needs one of them",
    ("tokenizer", "run", *TEXT, "--extend", "3", "--prune", "3", "--to", "new"): "give --extend or --prune, not both",
    ("tokenizer", "run", *TEXT, "--prune", "3", "--to", "new"): "has a tokenizer of kind bytes; only bpe and tiktoken",
    ("tokenizer", "run", *TEXT, "--compare", "gpt3"): "Did you mean 'gpt2'?",
    ("tokenizer", "run", *TEXT, "--show", "0"): "show=0 must be at least 1",
    ("tokenizer", "run", *TEXT, "--data.packing", "best_fit"): "data.packing='best_fit' has no effect",
    ("import", "folder"): "to is missing",
    ("import", "folder", "--to", ""): "to is empty; name a folder",
    ("import", "run", "--to", "new"): "run: no Hugging Face model folder (it has no config.json)",
    ("import", "folder", "--to", "new", "--base", "run"): "base=run has no effect without a PEFT folder",
    ("export", "run"): "to is missing",
    ("export", "run", "--to", ""): "to is empty; name a folder",
    ("export", "run", "--to", "run"): "run: the folder is not empty",
    ("export", "run", "--to", "text.txt"): "text.txt: cannot make this folder: File exists",
    ("export", "run", "--to", "new", "--merge"): "merge needs a lora adapter",
    ("export", "run", "--to", "new", "--adapter"): "adapter needs a lora adapter",
    ("export", "run", "--to", "new", "--head"): "has task.kind=pretrain and no single head to export",
    ("export", "run", "--to", "new", "--family", "gtp2"): "Did you mean 'gpt2'?",
    ("export", "run", "--to", "new", "--max_shard_mb", "-1"): "max_shard_mb=-1 must not be negative",
    ("export", "run", "--to", "new", "--average", "2"): "average=2 has no effect without checkpoint=latest",
    ("export", "run", "--to", "new", "--checkpoint", "latest", "--average", "2"): "average=2 needs as many checkpoints",
    ("export", "run", "--to", "new.gguf", "--head"): "head=True has no effect",
    ("export", "run", "--to", "new", "--gguf_type", "f32"): "gguf_type='f32' has no effect",
    ("export", "damaged", "--to", "new", "--strict"): "manifest.json is damaged; without the strict option",
    ("train", ""): "the first word is an empty path",
    ("inspect", "", "--text", "ab"): "the first word is an empty path",
    ("report", ""): "runs holds an empty path",
    ("doctor", "--cache_dir", ""): "cache_dir is empty",
    ("tokenizer", "run", "--data.path", ""): "data.path holds an empty path",
    ("train", "c.yaml", "--data.path", ""): "data.path holds an empty path",
    ("train", "c.yaml", "--cache_dir", ""): "cache_dir is empty; name a folder",
    ("train", "c.yaml", "--init_from", "folder"): "folder: no run directory",
    ("train", "c.yaml", "--train.num_epochs", "1e30", "--train.num_steps", "1000"): "must be at most 2147483647",
    ("train", "c.yaml", "--train.num_epochs", "1e300"): "is too large",
    ("train", "c.yaml", "--train.patience", "2", "--train.eval_every", "0"): "train.patience=2 has no effect",
    ("train", "c.yaml", "--depth", "2"): "depth have no effect with c.yaml",
    ("train", "c.yaml", "--data.skip", "nowhere"): "nowhere",
    ("train", "c.yaml", "--data.skip", "folder"): "folder",
    ("train", "c.yaml", "--data.encoding", "utf-16"): "text.txt",
    ("train", "c.yaml", "--data.path", "binary"): "binary: ending '' is not one of",
    ("train", "c.yaml", "--mesh.data", str(2**62)): "mesh.data=4611686018427387904 does not match",
    ("train", "c.yaml", "--log.project", "x"): "log.project='x' has no effect",
    ("train", "c.yaml", "--run_dir", "text.txt"): "run_dir=text.txt",
}


@pytest.mark.parametrize("words", CALLS, ids=lambda words: " ".join(words)[:60])
def test_wrong_call(place, capsys, monkeypatch, words):
    assert CALLS[words] in call(capsys, monkeypatch, place, words)
