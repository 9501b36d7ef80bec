"""No input is ever executed, except compiled programs of the user's own cache."""

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
from gptjax.errors import UserError
from gptjax.exchange.hf_model import export_model
from gptjax.machine import compile_cache, private, processor
from gptjax.machine.native import build, compiler
from tests.faults.inputs import MODEL, accepted, make_run, params, write_config
from tests.native.kernels import need
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
    "ctypes.CDLL(path)",  # the allocator's part, from `compiler.library`, which checks what it returns
    "ctypes.CDLL(str(_built(folder)))",  # the kernels, likewise
    "ctypes.CDLL(str(_built(folder, WITHOUT_TILES)))",
)
DATA = {
    *("Structure", "POINTER", "byref", "cast", "create_string_buffer"),
    *("c_char_p", "c_int64", "c_size_t", "c_void_p"),
}
"""Names of ctypes that describe arguments and load nothing."""
KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only", "shell"}


def unsafe(source: str) -> list[str]:
    """Imports and calls of a file that could execute data."""
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
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ctypes" and node.attr not in DATA:
            found += [ast.unparse(node)] if id(node) not in own else []
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
    export_model(MODEL, params(), None, root / "hf", lambda _: None)
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
if len(sys.argv) > 2:
    print("compiled", flush=True)
    sys.stdin.read()
    os._exit(0) if sys.argv[2] == "killed" else None
"""


def process(cache: Path, *args: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(cache), *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def compute(cache: Path) -> tuple[str, str]:
    running = process(cache)
    out, error = running.communicate()
    assert running.returncode == 0, error
    return out, error


def programs(cache: Path) -> list[Path]:
    return compile_cache._programs(compile_cache.compiled_folder(str(cache)))


@pytest.mark.fault(28, "a compiled program in the cache, cut or overwritten", "a warning; it is compiled again")
def test_damaged_compile_cache(tmp_path, seen):
    cache = tmp_path / "cache"
    result, _ = compute(cache)
    paths = programs(cache)
    before = [path.read_bytes() for path in paths]
    again, told = compute(cache)
    assert (again, told) == (result, "") and before, "programs that are whole are used"
    assert programs(cache) == paths
    faults = itertools.cycle([lambda raw: b"", lambda raw: raw[:99], flip_a_bit, lambda raw: b"\0" * len(raw)])
    for path, raw, fault in zip(paths, before, faults, strict=False):
        path.write_bytes(fault(raw))
    again, told = compute(cache)
    assert again == result
    assert told.count("\n") == 1 and f"{len(paths)} compiled programs are damaged; they are compiled again" in told
    assert compute(cache) == (result, "")
    (line,) = told.splitlines()
    seen(f"the same result; {line.replace(str(cache), '')}")


def flip_a_bit(raw: bytes) -> bytes:
    return raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:]


@pytest.mark.fault(28, "two processes with one cache, one killed", "each signs its own programs; none is lost or mixed")
def test_a_process_signs_its_own_programs_and_leaves_those_of_others(tmp_path, seen):
    cache = tmp_path / "cache"
    (cache / "empty").mkdir(parents=True)
    first = process(cache, "killed")
    assert first.stdout is not None and first.stdout.readline() and first.stdout.readline() == "compiled\n"
    assert programs(cache) == [], "what runs has signed nothing yet"
    [running] = compile_cache.compiled_folder(str(cache)).glob(f"{compile_cache.RUNNING}/.*[!k]")
    own = sorted(running.iterdir())
    assert own
    compute(cache)
    signed = programs(cache)
    assert [compile_cache.plain_name(path) for path in signed] == [path.name for path in own]
    assert sorted(running.iterdir()) == own, "the other process's programs are still there"
    first.communicate()
    assert running.exists(), "it was killed"
    compute(cache)
    assert not running.exists() and programs(cache) == signed
    seen("the second process signed its own; what the killed one left is removed by the next")


@pytest.mark.fault(
    28, "a cache of compiled programs that others can write", "another folder is used, or none; one line"
)
def test_compile_cache_is_private(tmp_path, capsys, seen, monkeypatch):
    monkeypatch.setattr(Config, "cache_dir", str(tmp_path / "default"))
    folder = compile_cache.compiled_folder(str(tmp_path / "own"))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700, 0o700]
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    assert compile_cache.usable_folder(str(shared)) == compile_cache.compiled_folder(Config.cache_dir)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{shared} can be written by others (mode 0777; chmod go-w)" in told
    assert f"kept in {Config.cache_dir}" in told
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert compile_cache.usable_folder(Config.cache_dir) is None
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "belongs to another user" in told and "not kept" in told
    seen("0777: the default folder is used; a folder of another user: none; each with one line")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_folder_that_others_can_write_anywhere_above_is_not_private(tmp_path, mode, depth):
    folder = tmp_path / "a" / "b" / "c"
    assert private.private_folder(folder) == folder
    above = (folder, *folder.parents)[depth]
    os.chown(above, -1, 54321)  # not a group of this user alone
    above.chmod(mode)
    with pytest.raises(private.UntrustedError, match="can be written by others"):
        private.private_folder(folder)
    above.chmod(mode | stat.S_ISVTX)
    if depth:  # in a sticky folder others cannot replace this user's files
        private.private_folder(folder)
    else:
        with pytest.raises(private.UntrustedError, match="can be written by others"):
            private.private_folder(folder)


def test_a_symbolic_link_is_followed_with_all_that_is_above_it(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "shared").mkdir()
    (tmp_path / "link").symlink_to("shared/second")
    (tmp_path / "shared" / "second").symlink_to(tmp_path / "real")
    private.private_folder(tmp_path / "link" / "c")
    assert (tmp_path / "real" / "c").is_dir()
    (tmp_path / "shared").chmod(0o777)  # whoever can write there can lead the second link elsewhere
    with pytest.raises(private.UntrustedError, match="shared"):
        private.private_folder(tmp_path / "link" / "c")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
def test_a_folder_of_another_user_is_not_private(tmp_path):
    folder = tmp_path / "a" / "b"
    private.private_folder(folder)
    for place in (folder, folder.parent):
        os.chown(place, 12345, -1)
        with pytest.raises(private.UntrustedError, match="belongs to another user"):
            private.private_folder(folder)
        os.chown(place, 0, -1)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_not_used(tmp_path, mode):
    folder = private.private_folder(tmp_path / "a")
    key = private.signing_key(folder)
    assert len(key) == private.KEY_BYTES and private.signing_key(folder) == key
    assert stat.S_IMODE((folder / private.KEY_FILE).stat().st_mode) == 0o600
    (folder / private.KEY_FILE).chmod(mode)
    with pytest.raises(private.UntrustedError, match=f"has mode {mode:04o}"):
        private.signing_key(folder)


def test_a_short_key_is_not_used(tmp_path):
    folder = private.private_folder(tmp_path / "a")
    private.signing_key(folder)
    (folder / private.KEY_FILE).write_bytes(b"")
    with pytest.raises(private.UntrustedError, match="has 0 bytes, must have 32; delete it"):
        private.signing_key(folder)


def test_another_key_makes_another_checksum_and_so_does_another_name(tmp_path):
    folders = [private.private_folder(tmp_path / name) for name in "ab"]
    keys = [private.signing_key(folder) for folder in folders]
    assert len({private.checksum(key, name, b"content") for key in keys for name in "xy"}) == 4


PLANT = """
#include <stdio.h>
__attribute__((constructor)) static void planted() { fclose(fopen("%s", "w")); }
"""


@pytest.mark.fault(28, "a library planted where another user can write, or without our key", "never loaded")
@pytest.mark.parametrize("place", ["shared cache", "jax's cache", "private folder, not signed", "signed as another"])
def test_a_planted_library_is_not_loaded(tmp_path, place, seen):
    need()
    marker, cache = tmp_path / "executed", tmp_path / "cache"
    (tmp_path / "plant.cc").write_text(PLANT % marker)
    planted = tmp_path / "plant.so"
    subprocess.run([str(compiler.find()), "-shared", "-fPIC", str(tmp_path / "plant.cc"), "-o", planted], check=True)
    run = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(planted)!r})"]
    subprocess.run(run, check=True)
    assert marker.exists(), "the planted library works"
    marker.unlink()

    folder = compile_cache.compiled_folder(str(cache))
    assert build._folder is not None
    ours = build._built(build._folder, build.WITHOUT_TILES)
    environment = {}
    if place == "shared cache":
        cache.chmod(0o777)
    if place == "jax's cache":
        environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
        folder = tmp_path
    key = private.signing_key(folder if place != "jax's cache" else build._folder)
    name = private.plain_name(ours)
    right = private.signed_name(key, name, b"other content")
    shutil.copy(planted, folder / {"private folder, not signed": name}.get(place, right))
    program = (
        "import sys; from pathlib import Path; import os\n"
        "from gptjax.machine import compile_cache; from gptjax.machine.native import build, compiler\n"
        "compiler._compile = lambda command, result: Path(result).write_bytes(b'')\n"  # whatever is not found is made
        "compile_cache.start(sys.argv[1]); print(build.state())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(cache)],
        env={**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert "could not be compiled" in done.stdout, done.stderr  # the empty library that was made instead
    assert not marker.exists()
    seen(f"{place}: not executed")


def test_each_kind_of_processor_has_a_cache_of_its_own(tmp_path, monkeypatch):
    mine = compile_cache.compiled_folder(str(tmp_path))
    assert mine == compile_cache.compiled_folder(str(tmp_path))
    monkeypatch.setattr(processor.platform, "processor", lambda: "another")
    assert compile_cache.compiled_folder(str(tmp_path)) != mine


def test_an_address_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cache_dir", "run_dir"):
        with pytest.raises(UserError, match=f"{name}='gs://bucket/x' is an address"):
            Config(**{"run_dir": "run", name: "gs://bucket/x"})
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/x")
    compute(tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
