"""The manual: its commands are ones that gptjax has, its links lead somewhere, and the start page works as written."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import api_page
from gptjax import cli
from gptjax.cli import VERBS, main
from gptjax.config.dial import DialConfig
from gptjax.config.reader import flag_types
from gptjax.config.run import Config
from gptjax.config.start import start_config
from gptjax.config.verbs.prepare import PrepareConfig
from gptjax.errors import UserError
from tests.tiny import write_corpus

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
ALSO_OF_A_RUN = ("prepare", "plan", "verify-resume", "lr-find", "sweep", "profile")
"""Verbs that take the options of a run beside their own."""
PROGRAMS = {("python", "train.py"): "train", ("python", "sample.py"): "sample", ("python", "-m", "gptjax"): None}
TINY = ("--train.num_steps", "2", "--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "1",
        "--model.block_size", "32", "--train.batch_size", "4", "--train.eval_windows", "4", "--train.eval_every", "2",
        "--tokenizer.vocab_size", "300", "--train.sample_tokens", "4")  # fmt: skip


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Verbs and arguments of a block's commands of gptjax."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\||;", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # an apostrophe in printed text
                continue
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words.pop(0)
            words = words[next((n for n, word in enumerate(words) if word in ("gptjax", "python")), 0) :]
            for start, verb in PROGRAMS.items():
                if tuple(words[: len(start)]) == start:
                    words = ["gptjax", *([verb] if verb else []), *words[len(start) :]]
            if len(words) > 1 and words[0] == "gptjax" and re.fullmatch(r"[a-z-]+", words[1]):
                found.append((words[1], words[2:]))
    return found


def options_of(verb: str) -> set[str]:
    own = set(flag_types(VERBS[verb][1])) | {"help", "no-restart"}
    own |= set(flag_types(Config)) if verb in ALSO_OF_A_RUN else set()
    return own | (set(flag_types(DialConfig)) if verb in ("train", "prepare") else set())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_verbs_and_options_that_exist(page):
    for verb, words in [command for block in blocks(page) for command in commands(block)]:
        assert verb in VERBS, f"{name(page)}: gptjax {verb}"
        known = options_of(verb) | ({"shard"} if verb == "prepare" else set())
        for word in words:
            if re.match(r"--\w", word) and "…" not in word and "..." not in word:
                assert word[2:].partition("=")[0] in known, f"{name(page)}: gptjax {verb} {word}"


PLACEHOLDER = re.compile(r"…|\.\.\.|\$|^<|[A-Z_]{4,}|^[A-Z](/[A-Z])?$")
"""Words that a reader replaces by values of his own."""


def parse(verb: str, words: list[str]) -> None:
    """Reads a command as the command line does: options, their values, and the config file that it names."""
    first = {"report": "runs", "doctor": "check", "scaling-fit": "runs"}.get(verb)
    if first:
        words = cli._places(words, first)
    place, rest = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    options = {"train": DialConfig, "prepare": PrepareConfig}.get(verb, VERBS[verb][1])
    own, others = cli._split_flags(options, rest)
    cli._flags(options, own)
    if verb not in (*ALSO_OF_A_RUN, "train"):
        assert not others, others
        return
    dial, others = cli._split_flags(DialConfig, [*(own if verb == "train" else []), *others])  # of prepare too
    flags = cli.read_flags(Config, others)
    if place.endswith(".yaml") and place != "CONFIG.yaml" and verb != "sweep":
        start_config(str(ROOT / place) if place.startswith("configs/") else place, flags, False)
    elif not place:
        start_config("", flags, False, cli._flags(DialConfig, dial))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_without_placeholders_are_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for verb, words in [command for block in blocks(page) for command in commands(block)]:
        plain = [word for word in words if " " not in word and not word.startswith("--") and word != "CONFIG.yaml"]
        if any(PLACEHOLDER.search(word) for word in plain):
            continue
        try:
            parse(verb, words)
        except UserError as error:
            pytest.fail(f"{name(page)}: gptjax {verb} {shlex.join(words)}: {error}")


def test_a_command_with_a_wrong_value_is_not_accepted():
    parse("train", ["configs/demo.yaml", "--train.num_steps", "3"])
    for verb, words in (
        ("train", ["configs/demo.yaml", "--train.num_steps", "three"]),
        ("train", ["configs/no_such.yaml"]),
        ("sample", ["--run_dir", "x", "--temperature", "-1"]),
        ("plan", ["configs/demo.yaml", "--devices", "8", "--chip", "h1000"]),
    ):
        with pytest.raises(UserError):
            parse(verb, words)


def test_commands_are_found():
    found = {verb for page in PAGES for block in blocks(page) for verb, _ in commands(block)}
    assert found >= {"train", "sample", "report", "inspect", "sweep", "lr-find", "plan", "predict", "export"}
    assert commands("A=1 gptjax train a.yaml \\\n --seed 1  # why\n") == [("train", ["a.yaml", "--seed", "1"])]


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads)
    return {re.sub(r"[^\w\- ]", "", head).strip().replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{name(page)}: {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{name(page)}: {target}"


def test_every_page_is_in_the_menu_of_the_site():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == set(
        re.findall(r": ([a-z_]+\.md)$", menu, re.MULTILINE)
    )


def test_options_that_other_programs_names_are_translated_to_exist():
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    sections = {option.partition(".")[0] for option in flag_types(Config) if "." in option}
    cells = [row.split(" | ", 1)[1] for row in text.splitlines() if row.startswith("| ") and " | " in row]
    ours = {word for cell in cells for word in re.findall(r"`(?:--)?([a-z_]+(?:\.[a-z_0-9]+)+)", cell)}
    ours = {option for option in ours if option.partition(".")[0] in sections}
    assert len(ours) > 50 and ours <= set(flag_types(Config)) | {"log.", "mesh."}, ours - set(flag_types(Config))


def test_the_start_page_works_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "more.txt").write_text("The same words again.\n" * 50)
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    marked = [
        command for block in re.findall(r"<!-- run -->\n```\n(.*?)```", text, re.DOTALL) for command in commands(block)
    ]
    assert [verb for verb, _ in marked] == ["train", "report", "sample", "inspect"]
    short = {"train": [*TINY, "--cache_dir", str(tmp_path / "cache")], "sample": ["--max_new_tokens", "4"]}
    for verb, words in marked:
        assert main([verb, *words, *short.get(verb, [])]) == 0, capsys.readouterr().err
    assert {"report.html", "inspect.html", "events.jsonl"} <= {path.name for path in (tmp_path / "runs/mine").iterdir()}


@pytest.mark.slow
def test_the_speedrun_goes_from_text_to_answers(tmp_path, monkeypatch, capsys):
    """Every command of `make speedrun`, with a small model and few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    rows = [json.dumps({"prompt": f"def f{n}(x):", "response": f"Returns {n} times x."}) + "\n" for n in range(40)]
    for split in ("train", "validation"):
        (tmp_path / "runs/finetune/rows").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"runs/finetune/rows/docstrings.{split}.jsonl").write_text("".join(rows))
    recipe = re.search(r"^speedrun: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    found = commands(recipe[1].replace("$(BIN)/", ""))
    assert [verb for verb, _ in found] == ["train", "evaluate", "train", "sample", "report"]
    cache = ["--cache_dir", str(tmp_path / "cache")]
    learned = ["--train.num_steps", "2", "--train.batch_size", "4", "--train.eval_every", "2", *cache]
    short = iter([[*TINY, *cache, "--data.max_documents", "60"], [], learned, [], []])
    for verb, words in found:
        assert main([verb, *words, *next(short)]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "def is_empty(self):" in shown and (tmp_path / "runs/speedrun.html").is_file()


def test_the_python_reference_is_that_of_the_docstrings():
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == api_page.page(), (
        "a docstring of gptjax/api.py changed: python bench/api_page.py > docs/api.md"
    )
    assert "`temperature`" not in api_page.text_of(api_page.entry), "only names under Args become a list"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, last = (float(loss) for loss in re.findall(r"\nstep +\d+  validation loss ([\d.]+)", done.stdout)[-2:])
    assert last < first and "embed/tokens" in done.stdout


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("material", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Model.generate" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
