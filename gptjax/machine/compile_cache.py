"""The cache of compiled programs."""

import atexit
import contextlib
import os
import sys
from pathlib import Path

from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.machine import processor


def start(cache_dir: str = Config.cache_dir) -> None:
    """Turns on the cache of compiled programs. Where the default one cannot be written, it says so and does without.

    Raises:
        UserError: Another one was chosen and cannot be written.
    """
    import jax

    try:
        folder = compiled_folder(cache_dir)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        if cache_dir != Config.cache_dir:
            raise UserError(f"cache_dir={cache_dir} cannot be written: {reason}") from None
        print(f"gptjax: compiled programs are not kept: {reason}", file=sys.stderr)
        return
    unsound, _ = check_programs(folder)
    damaged = [path for path in unsound if _signature(path).exists()]  # the others may be a running process's
    if damaged:
        print(f"gptjax: {folder}: {len(damaged)} compiled programs are damaged; they are made anew", file=sys.stderr)
    for path in unsound:
        path.unlink(missing_ok=True)
        _signature(path).unlink(missing_ok=True)
    atexit.register(sign_programs)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pretend_devices(count: int) -> None:
    """Makes this process's CPU look like so many devices; other devices are not touched."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def compiled_folder(cache_dir: str) -> Path:
    """Makes the folder of compiled programs and returns it.

    What it holds is executed, so only its owner may read and write there. Each kind of processor has a folder of its
    own, since a program that was compiled for another one may end in an illegal instruction.

    Raises:
        OSError: It cannot be made, or belongs to another user.
    """
    folder = Path(cache_dir).expanduser().absolute() / "compiled" / processor.identity()
    folder.mkdir(parents=True, exist_ok=True)
    for private in (folder.parent, folder):
        if private.stat().st_uid != os.getuid():
            raise PermissionError(1, "belongs to another user, who could put programs there", str(private))
        private.chmod(0o700)
    return folder


def check_programs(folder: Path) -> tuple[list[Path], int]:
    """Returns the programs in the cache that are not as they were signed, and how many there are in all.

    JAX runs what it finds there: of 36 entries with flipped bits, 26 were told and compiled again, 8 did no harm, one
    gave a wrong result and one crashed the process. Programs without signature were being written when a process was
    killed; they count as damaged.
    """
    programs = _programs(folder)
    return [path for path in programs if not is_sound(path)], len(programs)


def is_sound(path: Path) -> bool:
    """Whether a file of the cache is there as it was signed."""
    return path.exists() and _read(_signature(path)) == _checksum(path)


def sign(path: Path) -> None:
    """Notes a file's checksum beside it."""
    write_atomic(_signature(path), _checksum(path))


def sign_programs() -> None:
    """Notes the checksums of programs in the cache that have none: those that this process compiled."""
    import jax

    folder = jax.config.values["jax_compilation_cache_dir"]
    for path in _programs(Path(folder)) if folder else []:
        if not _signature(path).exists():
            with contextlib.suppress(OSError):
                sign(path)


def _programs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


def _signature(program: Path) -> Path:
    return program.with_name(f"{program.name}.xxh3")


def _checksum(path: Path) -> bytes:
    import xxhash

    return xxhash.xxh3_128_hexdigest(_read(path) or b"").encode()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
