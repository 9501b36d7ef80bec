"""Breaks lines of the program on purpose, one at a time, and tells which test notices.

    python bench/mutants.py                    # all of bench/mutants.yaml, in about an hour
    python bench/mutants.py --part 2/4         # every fourth, from the second
    python bench/mutants.py dropout patience   # those with one of these words in their description

Each entry of the list has `breaks` (what is wrong then), `file`, `was` (text that stands there once), `now` (its
replacement) and `tests` (files or single tests that should notice). Tests run on a copy of the tree, first as it is,
then with each entry's change.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
TIMEOUT = 900
"""Seconds after which a mutant counts as caught: it never ends."""


class Mutant(NamedTuple):
    """One mistake; the fields are those of an entry of the list."""

    breaks: str
    file: str
    was: str
    now: str
    tests: list[str]


def read_mutants(path: Path) -> list[Mutant]:
    """Reads a list of mutants."""
    return [Mutant(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def problems(root: Path, mutants: Sequence[Mutant]) -> Iterator[str]:
    """Yields a line for each mutant that does not fit the tree."""
    for mutant in mutants:
        path = root / mutant.file
        count = path.read_text(encoding="utf-8").count(mutant.was) if path.is_file() else -1
        if count < 0:
            yield f"{mutant.breaks!r}: there is no file {mutant.file}"
        elif count != 1:
            yield f"{mutant.breaks!r}: {mutant.file} has this text {count} times, must have it once: {mutant.was!r}"
        elif mutant.was == mutant.now:
            yield f"{mutant.breaks!r}: changes nothing"
        for test in mutant.tests:
            module, _, name = test.partition("::")
            source = (root / module).read_text(encoding="utf-8") if (root / module).is_file() else ""
            if f"def {name}" not in source:
                yield f"{mutant.breaks!r}: there is no test {test}"


def copy_tree(root: Path, folder: Path) -> Path:
    """Copies what git tracks or would track to `folder`/tree, beside a link to what stands beside `root` as shared."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    tree = folder / "tree"
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, tree / name)
    for link, target in ((folder / "shared", root.parent / "shared"), (tree / ".pytest_cache", root / ".pytest_cache")):
        if target.is_dir():  # of the second: compiled programs
            link.symlink_to(target.resolve())
    return tree


def run_tests(tree: Path, tests: Sequence[str]) -> str:
    """Runs tests until the first fails; returns its name, or an empty string where all pass.

    Raises:
        SystemExit: They cannot be run.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    # Two changes of one file within a second could not be told apart by the times of its bytecode.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no end within {TIMEOUT} s"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?::.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return failed[1]
    if done.returncode == 0 and re.search(r"\d+ passed", done.stdout):
        return ""
    raise SystemExit(f"{done.stdout}\n{done.stderr}\n{' '.join(tests)}: cannot be run")


def run_mutants(root: Path, mutants: Sequence[Mutant]) -> list[str]:
    """Returns the test that noticed each mutant; an empty string: none did.

    Raises:
        SystemExit: A mutant does not fit the tree, the tests fail without one, or cannot be run.
    """
    if wrong := list(problems(root, mutants)):
        raise SystemExit("\n".join(wrong))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_tree(root, Path(folder))
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        if failed := run_tests(tree, tests):
            raise SystemExit(f"{failed} fails without a mutant")
        noticed = []
        for number, mutant in enumerate(mutants, 1):
            began, path = time.monotonic(), tree / mutant.file
            original = path.read_text(encoding="utf-8")
            path.write_text(original.replace(mutant.was, mutant.now), encoding="utf-8")
            noticed.append(run_tests(tree, mutant.tests))
            path.write_text(original, encoding="utf-8")
            seconds = time.monotonic() - began
            print(f"{number}/{len(mutants)} {mutant.breaks}: {noticed[-1] or 'SURVIVED'} ({seconds:.0f} s)", flush=True)
    return noticed


def table(mutants: Sequence[Mutant], noticed: Sequence[str]) -> str:
    """What became of each mutant, and how many survived."""
    rows = [f"| {m.breaks} | {m.file} | {test or '**SURVIVED**'} |" for m, test in zip(mutants, noticed, strict=True)]
    survived = sum(not test for test in noticed)
    end = f"{len(mutants)} mutants, {len(mutants) - survived} caught, {survived} survived"
    return "\n".join(["| mistake | file | caught by |", "|---|---|---|", *rows, "", end])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants with one of these words in their description or file")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th mutant, from the K-th")
    parser.add_argument("--list", type=Path, default=ROOT / "bench" / "mutants.yaml")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    mutants = read_mutants(options.list)[part - 1 :: parts]
    if options.words:
        mutants = [m for m in mutants if any(word in f"{m.breaks} {m.file}" for word in options.words)]
    noticed = run_mutants(ROOT, mutants)
    print(table(mutants, noticed))
    return 1 if "" in noticed else 0


if __name__ == "__main__":
    raise SystemExit(main())
