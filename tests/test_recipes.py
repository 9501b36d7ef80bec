"""The rows that recipes are trained on from a fresh clone, made of Python's own source."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.config.reader import load_config
from gptjax.tasks.registry import parse
from gptjax.text.rows import read_rows

ROOT = Path(__file__).parents[1]
MADE = ROOT / "configs" / "finetune" / "make_rows.py"
RECIPES = ("packages", "tokens", "docstrings")
SOURCE = '''
def add(a, b):
    """Adds two numbers.

    They may be large.
    """
    total = a + 12  # a comment
    return total + b


class A:
    def short(self): return 1

    def name(self):
        x = "text"
        return x if self else None
'''


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The files that the script makes of a library of two modules."""
    folder = tmp_path_factory.mktemp("rows")
    library = folder / "lib"
    for name in ("email", "http", "test"):
        (library / name).mkdir(parents=True)
        for number in range(30):
            (library / name / f"m{number}.py").write_text(SOURCE.replace("12", f"{number}{len(name)}"))
    code = f"import sysconfig; sysconfig.get_paths = lambda: {{'stdlib': {str(library)!r}}}; import runpy; "
    code += f"import sys; sys.argv = ['x', {str(folder)!r}]; runpy.run_path({str(MADE)!r}, run_name='__main__')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_read_the_rows_that_the_script_makes(rows, recipe):
    config = load_config(ROOT / "configs" / "finetune" / f"{recipe}.yaml")
    sides = []
    for [path] in (config.data.path, config.task.validation_path):
        assert Path(path).parent == Path("runs/finetune/rows")
        made = rows / Path(path).name
        sides.append(list(parse(read_rows([str(made)], "data.path"), config.task, config.data)))
    assert all(sides) and len(sides[0]) > len(sides[1])
    assert config.init_from == load_config(ROOT / "configs" / "demo.yaml").run_dir


def test_no_text_is_on_both_sides_and_no_test_is_read(rows):
    train, validation = (
        [json.loads(line) for line in (rows / f"packages.{side}.jsonl").read_text().splitlines()]
        for side in ("train", "validation")
    )
    assert not {row["text"] for row in train} & {row["text"] for row in validation}
    assert {row["label"] for row in train} == {"email", "http"}


def test_functions_docstrings_and_tokens_are_what_python_says():
    made = runpy.run_path(str(MADE))
    functions = {head: (text, doc) for text, head, doc in made["functions_of"](SOURCE)}
    assert set(functions) == {"def add(a, b):", "def name(self):"}, "one statement is no function to learn from"
    assert functions["def add(a, b):"][1] == "Adds two numbers."
    assert functions["def name(self):"][0].startswith("    def name(self):\n        x =")
    lines = list(made["tagged_lines"](SOURCE))
    assert "total\tNAME\n=\tOPERATOR\na\tNAME\n+\tOPERATOR\n12\tNUMBER\n\n" in lines
    assert any(line.startswith("return\tKEYWORD\nx\tNAME\nif\tKEYWORD\n") for line in lines)
