"""`gptjax doctor`: describes this machine, and verifies prepared data and runs completely."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from gptjax import __version__
from gptjax.checkpoints.checkpoint import FOLDER
from gptjax.checkpoints.choice import list_entries
from gptjax.checkpoints.manifest import DamagedError, verify
from gptjax.checkpoints.run_dir import CONFIG_FILE, TOKENIZER_FILE
from gptjax.config.model import ModelConfig
from gptjax.config.reader import load_config
from gptjax.config.run import Config
from gptjax.config.start import load_run_config
from gptjax.config.verbs.doctor import DoctorConfig
from gptjax.errors import UserError, one_line
from gptjax.machine import allocator, compile_cache
from gptjax.machine.native import build
from gptjax.machine.processor import core_count
from gptjax.model.attention import explain_attention
from gptjax.report.cost import readable_bytes
from gptjax.text.prepare import find_folder, open_folder
from gptjax.text.shards import MANIFEST
from gptjax.text.tokenizer import load_tokenizer

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets", "tiktoken", "tokenizers")

PrintRow = Callable[[str, str], object]
"""Prints a line from its heading and its text."""


def run_doctor(options: DoctorConfig) -> int:
    """Prints the report of `examine`; returns status 1 if something is damaged."""
    return 0 if examine(options) else 1


def examine(options: DoctorConfig, print_line: Callable[[str], object] = print) -> bool:
    """Describes the machine and verifies the paths of `options.check`; returns True if nothing is damaged.

    Args:
        options: Config files, run directories and folders of prepared data to verify.
        print_line: Called with each line of the report.

    Raises:
        UserError: A path is none of these.
    """
    paths = [Path(path).expanduser() for path in options.check]
    checks = [check for path in paths for check in _checks(path)]
    if options.all_data:
        checks += [_data_check(path.parent) for path in _prepared_folders(options.cache_dir)]

    def print_row(heading: str, text: str) -> None:
        print_line(f"{heading:12}{text}")

    with contextlib.suppress(OSError):  # `_describe_cache` reports it
        build.set_folder(compile_cache.compiled_folder(options.cache_dir))
    _describe_machine(print_row, options.cache_dir)
    _describe_cache(print_row, Path(options.cache_dir).expanduser())
    damaged = 0
    for check in checks:
        try:
            print_row("ok", check())
        except (UserError, OSError) as error:
            damaged += 1
            print_row("DAMAGED", one_line(error) or "")
    if checks:
        print_row("verdict", f"{damaged} of {len(checks)} damaged" if damaged else f"all {len(checks)} good")
    return not damaged


def _checks(path: Path) -> Iterator[Callable[[], str]]:
    """Yields the checks of a path. A check returns a description of undamaged data, or raises `UserError`."""
    if (path / MANIFEST).exists():
        yield _data_check(path)
    elif (path / CONFIG_FILE).exists():
        yield from _run_checks(path)
    elif path.is_file():
        config = load_config(path)
        yield lambda: _check_data_of(config)
        run_dir = Path(config.run_dir).expanduser()
        if (run_dir / CONFIG_FILE).exists():
            yield from _run_checks(run_dir, with_data=False)
    else:
        raise UserError(f"{path}: neither a config file, nor a run directory, nor a folder of prepared data")


def _run_checks(run_dir: Path, with_data: bool = True) -> Iterator[Callable[[], str]]:
    def check_description() -> str:
        config = load_run_config(run_dir)
        tokenizer = load_tokenizer(run_dir / TOKENIZER_FILE) if (run_dir / TOKENIZER_FILE).exists() else None
        if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"{run_dir / TOKENIZER_FILE}: has {tokenizer.vocab_size:,} ids,"
                f" the model has {config.model.vocab_size:,}"
            )
        return f"{run_dir}: {CONFIG_FILE}" + (f", {TOKENIZER_FILE}" if tokenizer else ", no tokenizer")

    yield check_description
    for checkpoint in list_entries(run_dir / FOLDER):
        yield functools.partial(_check_checkpoint, checkpoint)
    if with_data:
        yield lambda: _check_data_of(load_run_config(run_dir), run_dir)


def _check_checkpoint(folder: Path) -> str:
    try:
        manifest = verify(folder)
    except DamagedError as error:
        raise UserError(f"{folder}: {error}") from None
    size = sum(size for size, _ in manifest.files.values())
    return f"{folder}: step {manifest.step:,}, {len(manifest.files)} files, {readable_bytes(size)}"


def _check_data_of(config: Config, run_dir: Path | None = None) -> str:
    """Verifies the prepared data of a config, if it exists."""
    run_dir = run_dir or Path(config.run_dir).expanduser()
    if config.task.kind != "pretrain":
        return f"{run_dir}: task.kind={config.task.kind} reads rows when training starts; none are prepared"
    if config.sources:
        n = len(config.sources)
        return f"{run_dir or config.run_dir}: mixes {n} sources; gptjax doctor --all_data verifies their data"
    if not (config.data.path or config.data.source or config.data.hf_dataset):
        return f"{run_dir}: its config names no data"
    owner = run_dir if (run_dir / TOKENIZER_FILE).exists() else Path(config.init_from).expanduser()
    override = load_tokenizer(owner / TOKENIZER_FILE) if config.init_from else None
    folder, _ = find_folder(config.data, config.tokenizer, Path(config.cache_dir), override)
    if not (folder / MANIFEST).exists():
        return f"{folder}: not prepared yet"
    return _data_check(folder)()


def _data_check(folder: Path) -> Callable[[], str]:
    def check() -> str:
        start = time.monotonic()
        dataset = open_folder(folder, "full").dataset
        size = sum(path.stat().st_size for path in folder.glob("*.bin"))
        seconds = max(time.monotonic() - start, 1e-9)
        n_tokens = dataset.train.n_tokens + dataset.validation.n_tokens
        shards = len(dataset.train.tokens) + len(dataset.validation.tokens)
        return (
            f"{folder}: {n_tokens:,} tokens, {shards} shards, {readable_bytes(size)}, {size / seconds / 1e9:.1f} GB/s"
        )

    return check


def _prepared_folders(cache_dir: str) -> list[Path]:
    return sorted((Path(cache_dir).expanduser() / "data").glob(f"*/{MANIFEST}"))


def _describe_machine(print_row: PrintRow, cache_dir: str) -> None:
    memory = allocator.usable_memory()
    cores = core_count()
    print_row("gptjax", f"{__version__}, Python {platform.python_version()} ({sys.executable})")
    print_row("machine", f"{platform.system()} {platform.machine()}, {cores} cores, {readable_bytes(memory)} of memory")
    print_row("libraries", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES))
    devices = jax.devices()
    print_row("devices", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
    print_row("XLA_FLAGS", os.environ.get("XLA_FLAGS", "not set"))
    print_row("allocator", allocator.state_after_restart(cache_dir))
    if jax.default_backend() == "cpu":
        print_row("kernels", build.state())
    for dtype in ("bfloat16", "float32"):
        print_row("attention", f"{dtype}: {explain_attention(ModelConfig(), 1, dtype, True, False)}")


def _describe_cache(print_row: PrintRow, cache_dir: Path) -> None:
    try:
        folder = compile_cache.compiled_folder(str(cache_dir))
        damaged, count = compile_cache.check_programs(folder)
        state = f"{len(damaged)} damaged: the next run removes them" if damaged else "none damaged"
        print_row("compiled", f"{folder}: {count} programs, {state}")
    except OSError as error:
        print_row("compiled", f"not kept: {error.filename}: {error.strerror}")
    folders = _prepared_folders(str(cache_dir))
    size = sum(path.stat().st_size for folder in folders for path in folder.parent.glob("*.bin"))
    print_row("prepared", f"{len(folders)} data sets, {readable_bytes(size)}, in {cache_dir / 'data'}")
    place = next((folder for folder in (cache_dir, *cache_dir.parents) if folder.is_dir()), Path("/"))
    print_row("disk", f"{readable_bytes(shutil.disk_usage(place).free)} free at {place}")


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
