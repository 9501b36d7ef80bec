"""The cache of compiled programs.

JAX does not verify the programs in its cache: a damaged program can give wrong results or crash the process. So each
process gives JAX a separate folder, with links to the programs whose checksums are right. After each training program
and at its end, the process signs the programs that it compiled there with the key of the cache (`private.py`), and
publishes them. So a process signs only programs that it compiled, and never deletes programs that another one uses.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import sys
from pathlib import Path

from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.files import sync, temporary_name
from gptjax.machine import processor
from gptjax.machine.native import build, compiler
from gptjax.machine.private import (
    UntrustedError,
    is_sound,
    plain_name,
    private_folder,
    read_private,
    signed_name,
    signed_versions,
    signing_key,
)

PROGRAM = "-cache"
"""Suffix that JAX gives to names of programs."""
RUNNING = "running"
"""Subfolder with one folder for each running process, and a lock file that the process holds."""
_own_folders: dict[Path, Path] = {}
"""This process's own folder for each folder of programs."""


def start(cache_dir: str = Config.cache_dir) -> None:
    """Turns on the cache of compiled programs and of kernels.

    If another user can write to `cache_dir`, the default folder is used instead; if that is not usable either, nothing
    is cached. Each case prints one line on standard error.

    Raises:
        UserError: A folder was chosen and cannot be written, or `GPTJAX_NATIVE` has a wrong value.
    """
    import jax

    compiler.level()
    folder = usable_folder(cache_dir)
    if folder is None:
        return
    build.set_folder(folder)
    try:
        own = _own_folders.get(folder) or _make_own_folder(folder)
    except OSError as error:  # a full disk, or a file system without locks
        print(f"gptjax: compiled programs are not kept: {error.filename}: {error.strerror}", file=sys.stderr)
        return
    _own_folders[folder] = own
    jax.config.update("jax_compilation_cache_dir", str(own))
    # XLA's own caches would make the path of the folder part of each program's key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pretend_devices(count: int) -> None:
    """Makes this process's CPU appear as `count` devices; GPUs and TPUs are not used."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def compiled_folder(cache_dir: str) -> Path:
    """Makes the folder of compiled programs and libraries and returns it.

    Its files are executed, so only their owner may read and write there. Each kind of processor has a separate folder,
    because a program that was compiled for another one may stop at an illegal instruction.

    Raises:
        UntrustedError: Another user could write there.
        OSError: It cannot be made.
    """
    whole = private_folder(Path(cache_dir).expanduser() / "compiled")
    return private_folder(whole / processor.identity())


def check_programs(folder: Path) -> tuple[list[Path], int]:
    """Returns the programs in the cache whose signatures do not match, and the number of all programs."""
    key = signing_key(folder)
    programs = _programs(folder)
    return [path for path in programs if not is_sound(key, path)], len(programs)


def sign_programs() -> None:
    """Signs and publishes the programs that this process compiled, for later processes."""
    for folder, own in _own_folders.items():
        with contextlib.suppress(OSError):
            _publish(folder, own)


def usable_folder(cache_dir: str) -> Path | None:
    """Returns the folder of compiled programs in `cache_dir`, or else in the default folder; None: neither is private.

    Raises:
        UserError: A folder was chosen and cannot be written.
    """
    for place in dict.fromkeys((cache_dir, Config.cache_dir)):
        try:
            return compiled_folder(place)
        except UntrustedError as error:
            reason = f"{error.filename} {error.strerror}"
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            if cache_dir != Config.cache_dir and place == cache_dir:
                raise UserError(f"cache_dir={cache_dir} cannot be written: {reason}") from None
        instead = f"kept in {Config.cache_dir}" if place != Config.cache_dir else "not kept"
        print(f"gptjax: compiled programs and kernels are {instead}: {reason}", file=sys.stderr)
    return None


def _programs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if plain_name(path).endswith(PROGRAM))


def _make_own_folder(folder: Path) -> Path:
    """Creates the folder that JAX uses in this process, with links to the undamaged programs of `folder`."""
    damaged, _ = check_programs(folder)
    if damaged:
        print(
            f"gptjax: {folder}: {len(damaged)} compiled programs are damaged; they are compiled again", file=sys.stderr
        )
    for path in damaged:
        path.unlink(missing_ok=True)
    running = private_folder(folder / RUNNING)
    _remove_ended(running)
    own = temporary_name(running / "process")
    unlocked = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(unlocked, fcntl.LOCK_EX)  # until the process ends
    os.rename(own, _lock_of(own))
    own.mkdir(mode=0o700)
    for path in _programs(folder):
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # removed by another process; two versions
            _link(path, own / plain_name(path))
    atexit.register(_end, folder, own, os.getpid())
    return own


def _lock_of(own: Path) -> Path:
    return own.with_name(f"{own.name}.lock")


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:  # a file system without links
        shutil.copyfile(path, to)


def _publish(folder: Path, own: Path) -> None:
    key = signing_key(folder)
    for program in own.glob(f"*{PROGRAM}"):
        if not signed_versions(folder, program.name):
            program.chmod(0o600)
            sync(program)
            with contextlib.suppress(FileExistsError):  # another process published the same
                _link(program, folder / signed_name(key, program.name, read_private(program)))


def _end(folder: Path, own: Path, process: int) -> None:
    if os.getpid() != process:  # a fork, whose parent still uses the folder
        return
    with contextlib.suppress(OSError):
        _publish(folder, own)
    shutil.rmtree(own, ignore_errors=True)
    _lock_of(own).unlink(missing_ok=True)


def _remove_ended(running: Path) -> None:
    """Removes the folders of processes that were killed, recognised by their free locks."""
    for path in running.glob(".*.lock"):
        with contextlib.suppress(OSError), open(path, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_name(path.name.removesuffix(".lock")), ignore_errors=True)
            path.unlink(missing_ok=True)
