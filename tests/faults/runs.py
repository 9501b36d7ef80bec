"""Trainer processes and the run directories that they leave, for tests that break them."""

import os
import subprocess
import sys
import time
from pathlib import Path

from gptjax.config.reader import to_yaml
from gptjax.config.run import Config
from tests.tiny import run_config

ROOT = Path(__file__).parents[2]
SHARED_CACHE = ROOT / ".pytest_cache" / "shared"  # prepared data, kernels and compiled programs, for all processes


def process_config(tmp_path: Path, **sections) -> Config:
    """A small run for processes of its own."""
    return run_config(tmp_path, cache_dir=str(SHARED_CACHE), **sections)


def write_config(config: Config) -> Path:
    """Writes a config beside its run directory."""
    path = Path(config.run_dir).with_suffix(".yaml")
    path.write_text(to_yaml(config), encoding="utf-8")
    return path


def command(*args: object) -> list[str]:
    """The command line of a verb."""
    return [sys.executable, "-m", "gptjax", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    """Of a process on the CPU that finds this copy of the package."""
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""} | more


def run(*args: object, timeout: float = 120, **options) -> subprocess.CompletedProcess[str]:
    """Runs a verb to its end."""
    env = environment(**options.pop("env", {}))
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=timeout, env=env, **options)


def start(*args: object, **options) -> subprocess.Popen[str]:
    """Starts a verb, whose standard output and error are pipes unless `options` say otherwise."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command(*args), text=True, env=environment(), **pipes)


def wait_for_rows(config: Config, rows: int, timeout: float = 120) -> None:
    """Returns when a run has logged so many rows."""
    path = Path(config.run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {rows} rows in {path}")


def one_line(text: str) -> str:
    """What a user error printed, which must be a single line without a traceback."""
    assert text.startswith("gptjax: ") and text.count("\n") == 1 and "Traceback" not in text, text
    return text.removeprefix("gptjax: ").strip()


def checkpoints(config: Config) -> list[str]:
    """Names in the checkpoint folder."""
    return sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
