"""Nothing that is read is ever executed, but the compiled programs of one's own cache."""

import ast
import itertools
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.cli import main
from gptjax.config.run import Config
from gptjax.exchange.gpt2 import export_gpt2
from gptjax.machine import compile_cache, processor
from tests.faults.inputs import MODEL, accepted, make_run, params, write_config
from tests.tiny import write_corpus

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "gptjax").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py"])

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "joblib.load", "runpy.run_path"),
    *(
        "yaml.unsafe_load",
        "yaml.full_load",
        "yaml.load_all",
        "yaml.unsafe_load_all",
        "pandas.read_pickle",
        "pd.read_pickle",
    ),
}
OWN_LIBRARIES = (
    "ctypes.CDLL(None)",  # the process itself, which is asked what its allocator is: no file is loaded
    "ctypes.CDLL(path)",  # the allocator's part, compiled into the same folder
    "ctypes.CDLL(str(_built(program, Path(folder))))",  # the kernels, compiled here into a folder of their user's own
)
KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only", "shell"}


def unsafe(source: str) -> list[str]:
    """What a file imports or calls that can run what it reads."""
    found = []
    tree = ast.parse(source)
    own = {
        id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node) in OWN_LIBRARIES
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
            found += [
                alias.name for alias in node.names if alias.name.startswith("ctypes") and ast.unparse(alias) != "ctypes"
            ]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module)] if str(node.module).partition(".")[0] in {*MODULES, "ctypes"} else []
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ctypes" and id(node) not in own:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [name] if name in CALLS else []
            found += [f"{key}={value}" for key, value in keywords.items() if key in KEYWORDS]
            if name == "yaml.load" and keywords.get("Loader") not in ("yaml.SafeLoader", "_StrictLoader"):
                found.append("yaml.load")
            if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
                found.append("np.load")
    return found


@pytest.mark.fault(27, "code in gptjax that could run what it reads", "none: no pickle, eval, unsafe YAML, shell")
def test_no_code_runs_what_it_reads(seen):
    for path in SOURCES:
        assert not unsafe(path.read_text(encoding="utf-8")), path
    strict = ast.parse((ROOT / "gptjax/config/reader.py").read_text())
    [loader] = [node for node in ast.walk(strict) if isinstance(node, ast.ClassDef) and node.name == "_StrictLoader"]
    assert [ast.unparse(base) for base in loader.bases] == ["yaml.SafeLoader"]
    seen(f"{len(SOURCES)} files read with ast: none")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "torch.load(f)",
        "eval(x)",
        "yaml.load(f, Loader=yaml.Loader)",
        "yaml.unsafe_load(f)",
        "load_dataset(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
        "import ctypes; ctypes.CDLL(x)",
        "import ctypes; ctypes.cdll.LoadLibrary(x)",
        "import ctypes as c",
        "from ctypes import CDLL",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert unsafe(source)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A run, its prepared data, and a model folder of another program."""
    root = tmp_path_factory.mktemp("originals")
    make_run(root / "run")
    export_gpt2(MODEL, params(), None, root / "hf", lambda _: None)
    return root


@pytest.mark.fault(27, "pickle bytes in every file that gptjax reads", "never executed; refused")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of readers that give up
@pytest.mark.parametrize("part", ["run", "hf", "data"])
def test_pickle_bytes_in_every_file(originals, tmp_path, capsys, seen, part):
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists(), "the bomb works"
    marker.unlink()
    if part == "data":
        config = write_config(tmp_path, write_corpus(tmp_path / "corpus", 4))
        folder = Path(accepted(capsys, "prepare", config).splitlines()[-1])
        files = [config, *folder.iterdir(), *(tmp_path / "corpus").iterdir()]
        command = ["prepare", str(config)]
    else:
        shutil.copytree(originals / part, tmp_path / part)
        files = [path for path in (tmp_path / part).rglob("*") if path.is_file()]
        files += [tmp_path / part / name for name in ("pytorch_model.bin", "training_args.bin", "model.pkl")]
        command = ["sample", "--run_dir", str(tmp_path / part), "--prompt", "a", "--max_new_tokens", "1"]
    statuses = []
    for number, path in enumerate(files):
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(bomb)
        if part == "hf":
            command = ["import", str(tmp_path / part), "--to", str(tmp_path / f"imported-{number}")]
        try:
            statuses.append(main(command))
        except Exception as error:
            assert part == "run", f"{path}: {error}"
            statuses.append(1)
        assert not marker.exists(), path
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)
    assert 2 in statuses
    capsys.readouterr()
    seen(f"{part}: {len(files)} files in turn; none was executed, {len(statuses) - statuses.count(0)} refused")


PROGRAM = """
import os, sys
from gptjax.machine import compile_cache
compile_cache.start(sys.argv[1])
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x = jnp.arange(64.0).reshape(8, 8)
print(jax.jit(lambda x: jnp.tanh(x @ x / 1e4).sum())(x))
"""


def compute(cache: Path) -> tuple[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout, done.stderr


@pytest.mark.fault(28, "a compiled program in the cache, cut or overwritten", "a warning; it is compiled again")
def test_damaged_compile_cache(tmp_path, seen):
    cache = tmp_path / "cache"
    result, _ = compute(cache)
    programs = sorted((cache / "compiled").rglob("*-cache"))
    before = [path.read_bytes() for path in programs]
    again, told = compute(cache)
    assert (again, told) == (result, "") and before, "programs that are whole are used"
    faults = itertools.cycle([lambda raw: b"", lambda raw: raw[:99], flip_a_bit, lambda raw: b"\0" * len(raw)])
    for path, raw, fault in zip(programs, before, faults, strict=False):
        path.write_bytes(fault(raw))
    again, told = compute(cache)
    assert again == result
    assert told.count("\n") == 1 and f"{len(programs)} compiled programs are damaged; they are made anew" in told
    assert compute(cache) == (result, "")
    (line,) = told.splitlines()
    seen(f"the same result; {line.replace(str(cache), '')}")


def flip_a_bit(raw: bytes) -> bytes:
    return raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:]


@pytest.mark.fault(28, "a cache of compiled programs that others could write", "made private (0700), or not used")
def test_compile_cache_is_private(tmp_path, capsys, seen, monkeypatch):
    (tmp_path / "compiled").mkdir(mode=0o777)
    (tmp_path / "compiled").chmod(0o777)
    folder = compile_cache.compiled_folder(str(tmp_path))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700, 0o700]
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="another user"):
        compile_cache.compiled_folder(str(tmp_path))
    monkeypatch.setattr(Config, "cache_dir", str(tmp_path))
    compile_cache.start(str(tmp_path))
    assert "compiled programs are not kept" in capsys.readouterr().err
    seen("0777 became 0700; a folder of another user is not used, with one line")


def test_each_kind_of_processor_has_a_cache_of_its_own(tmp_path, monkeypatch):
    mine = compile_cache.compiled_folder(str(tmp_path))
    assert mine == compile_cache.compiled_folder(str(tmp_path))
    monkeypatch.setattr(processor.platform, "processor", lambda: "another")
    assert compile_cache.compiled_folder(str(tmp_path)) != mine
