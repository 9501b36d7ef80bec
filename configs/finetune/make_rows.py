"""Makes labelled rows of the standard library of the Python that runs it: python configs/finetune/make_rows.py [FOLDER]

Nothing is downloaded. The folder (default runs/finetune/rows) gets, each with the end .train and .validation:

packages.jsonl  classify: {"text": source of a function, "label": its package}
tokens.conll    tag: the tokens of a logical line, and whether each is a keyword, a name, a number, ...
docstrings.jsonl  instruct: {"prompt": the head of a function, "response": the first line of its docstring}

Rows are held out by a hash of their text, lines of code by that of their module, so that none is on both sides.
"""

import ast
import hashlib
import io
import json
import keyword
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("asyncio", "email", "tkinter", "unittest", "http", "multiprocessing", "xml", "importlib")
HELD_OUT = 8
"""One row of so many is for validation."""
LONGEST = 2000
"""Characters of a function."""
KINDS = {
    tokenize.NAME: "NAME",
    tokenize.NUMBER: "NUMBER",
    tokenize.STRING: "STRING",
    tokenize.OP: "OPERATOR",
}


def main() -> None:
    """Writes the files, and prints how many rows each has."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/finetune/rows")
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {}

    def add(name: str, ending: str, identity: str, row: str) -> None:
        held_out = int(hashlib.sha256(identity.encode()).hexdigest(), 16) % HELD_OUT == 0
        files.setdefault(f"{name}.{'validation' if held_out else 'train'}.{ending}", []).append(row)

    for path, name in modules():
        source, package = path.read_text(encoding="utf-8"), name.partition("/")[0]
        for text, head, doc in functions_of(source):
            if doc:
                add("docstrings", "jsonl", text, json.dumps({"prompt": head, "response": doc}) + "\n")
            if package in PACKAGES:
                add("packages", "jsonl", text, json.dumps({"text": text, "label": package}) + "\n")
        for line in tagged_lines(source) if package in PACKAGES else ():
            add("tokens", "conll", name, line)
    for name, rows in sorted(files.items()):
        (folder / name).write_text("".join(rows), encoding="utf-8")
        print(f"{folder / name}: {len(rows):,} rows")


def modules() -> Iterator[tuple[Path, str]]:
    """The library's modules that are UTF-8 and can be parsed, without tests, with their names below it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"} & set(name.split("/")):
            continue
        try:
            ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        yield path, name


def functions_of(source: str) -> Iterator[tuple[str, str, str]]:
    """Yields each function of a module once: its source, its first line, and its docstring's first line or nothing."""
    lines = source.splitlines(keepends=True)
    seen = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = "".join(lines[node.lineno - 1 : node.end_lineno])[:LONGEST]
        if len(node.body) > 1 and text not in seen:
            seen.add(text)
            doc = (ast.get_docstring(node) or "").strip().partition("\n")[0]
            yield text, lines[node.lineno - 1].strip(), doc


def tagged_lines(source: str) -> Iterator[str]:
    """Yields the logical lines of a module as sentences of CoNLL: a token and its kind a line, then a blank line."""
    words: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if len(words) > 3:
                yield "".join(words) + "\n"
            words = []
        elif token.type in KINDS and not any(character.isspace() for character in token.string):
            kind = "KEYWORD" if keyword.iskeyword(token.string) else KINDS[token.type]
            words.append(f"{token.string}\t{kind}\n")


if __name__ == "__main__":
    main()
