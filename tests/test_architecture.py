"""The shape of the code base: imports flow one way, and heavy libraries stay where they belong."""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gptjax"
ORDER = (
    *("errors", "files", "config", "machine", "text", "batches", "ops", "model", "parallel", "generation"),
    *(
        "evaluation",
        "report",
        "tasks",
        "checkpoints",
        "training",
        "planning",
        "exchange",
        "serving",
        "verbs",
        "api",
        "cli",
        "__main__",
    ),
)
ONLY_IN = {
    "flax": ("gptjax/model/",),
    "orbax": ("gptjax/checkpoints/arrays.py",),
    "datasets": ("gptjax/text/",),
    "tiktoken": ("gptjax/text/",),
    **dict.fromkeys(("tensorboardX", "wandb", "trackio", "mlflow"), ("gptjax/report/sinks.py",)),
    "rich": ("gptjax/report/",),
    "tyro": ("gptjax/cli.py",),
    "jinja2": ("gptjax/serving/",),
    "prompt_toolkit": ("gptjax/verbs/chat.py",),
    "sklearn": ("gptjax/evaluation/labels.py",),
    "seqeval": ("gptjax/evaluation/labels.py",),
    "matplotlib": ("gptjax/evaluation/labels.py", "gptjax/report/figures.py"),
    "sacrebleu": ("gptjax/evaluation/text_scores.py",),
    "rouge_score": ("gptjax/evaluation/text_scores.py",),
    "lm_eval": ("gptjax/exchange/harness.py",),
}
NO_JAX = ("errors", "files", "config", "text", "batches")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@functools.cache
def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def section(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_part_has_its_place_in_the_order():
    assert {section(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "gptjax" and parts[1] != "__version__":
            allowed = ORDER[: ORDER.index(section(path)) + (1 if path.parent != PACKAGE else 0)]
            assert parts[1] in allowed, f"gptjax/{path.relative_to(PACKAGE)} imports {name}, which comes later"


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_where_they_belong(library):
    for path in FILES:
        if library in {name.split(".")[0] for name in imports_of(path)}:
            place = str(path.relative_to(PACKAGE.parent))
            assert place.startswith(ONLY_IN[library]), f"{place} imports {library}"


def test_text_and_batches_do_without_jax():
    for path in FILES:
        if section(path) in NO_JAX:
            assert not {"jax", "flax", "optax"} & {name.split(".")[0] for name in imports_of(path)}, path


def test_nothing_unsafe_is_called():
    banned = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
    for path in FILES:
        assert not banned & {name.split(".")[0] for name in imports_of(path)}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword):
                assert node.arg not in ("allow_pickle", "trust_remote_code"), f"{path}:{node.value.lineno}"
