"""Prints docs/api.md, the reference of the Python API, from signatures and docstrings: python bench/api_page.py

`tests/test_docs.py` compares the page with what this prints.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

import gptjax
from gptjax.errors import UserError

HEAD = """# Python reference

This page is for you if you call gptjax from Python and look for the arguments of a function. It is
made from the docstrings by `python bench/api_page.py > docs/api.md`. A first example is in
[python.md](python.md), and a [notebook](notebook.ipynb) goes through the calls.

A `Texts` is a text or a list of texts, `Ids` a list or an array of token ids.
"""


def page() -> str:
    parts = [HEAD, *entry("gptjax.load", gptjax.load), *entry("gptjax.train", gptjax.train)]
    parts += [
        "## gptjax.Config\n",
        "The config of a run, frozen. Its sections and their options are those of the YAML files; `gptjax train --help`"
        " lists all of them with their defaults.\n",
        "## gptjax.Model\n",
        text_of(gptjax.Model),
    ]
    for name, member in vars(gptjax.Model).items():
        if not name.startswith("_") and (callable(member) or isinstance(member, property)):
            parts += entry(f"Model.{name}", member, "###")
    parts += ["## gptjax.errors.UserError\n", text_of(UserError)]
    return "\n".join(parts)


def entry(name: str, member: Callable | property, level: str = "##") -> Iterator[str]:
    yield f"{level} {name}\n"
    if not isinstance(member, property):
        [function] = ast.parse(textwrap.dedent(inspect.getsource(member))).body
        assert isinstance(function, ast.FunctionDef) and function.returns is not None
        arguments = re.sub(r"^self(, )?", "", ast.unparse(function.args))
        yield f"```python\n{name}({arguments}) -> {ast.unparse(function.returns)}\n```\n"
    yield text_of(member)


def text_of(member: object) -> str:
    """A docstring in Markdown: sections with names become lists."""
    lines, found = (inspect.getdoc(member) or "").splitlines(), []
    for line in lines:
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            found += [f"**{line.removesuffix(':')}**", ""]
        elif match := re.fullmatch(r"    (\w+): (.*)", line):
            found.append(f"- `{match[1]}`: {match[2]}")
        else:
            found.append(re.sub(r"^    (?=\S)", "", line) if not line.startswith("        ") else f"  {line.strip()}")
    return "\n".join(found) + "\n"


if __name__ == "__main__":
    print(page(), end="")
