"""Compiles C++ libraries for this processor and stores them, signed, in the private folder of compiled programs."""

import atexit
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptjax.errors import UserError, did_you_mean
from gptjax.files import temporary_name
from gptjax.machine import processor
from gptjax.machine.private import is_sound, publish_signed, signed_versions, signing_key

SWITCH = "GPTJAX_NATIVE"
LEVELS = ("auto", "avx512", "0")
"""Values of the switch: the best kernels for the processor, those for AVX-512, or no library."""
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
TIMEOUT = 300
"""Seconds that the compiler may take, and that a process waits for another one that compiles the same library."""


def level() -> str:
    """Value of `GPTJAX_NATIVE`.

    Raises:
        UserError: The value is not one of `LEVELS`.
    """
    value = os.environ.get(SWITCH, LEVELS[0])
    if value not in LEVELS:
        raise UserError(f"{SWITCH}={value!r} must be one of {', '.join(LEVELS)}.{did_you_mean(value, LEVELS)}")
    return value


def find() -> str | None:
    """Path of a C++ compiler; None: there is none."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")


def library(
    compiler: str, source: Path, headers: Sequence[Path], options: Sequence[str], made_with: str, folder: Path
) -> Path:
    """Returns the path of a compiled library; compiles it if it is missing for this compiler, or damaged.

    The file name identifies the processor and the compiler.

    Args:
        made_with: Version of another dependency, for example jaxlib.

    Raises:
        OSError: It cannot be written, or another user could have written the existing file.
        SubprocessError: The compiler failed.
    """
    key = signing_key(folder)
    texts = [path.read_bytes() for path in (source, *headers)]
    texts += [text.encode() for text in (*OPTIONS, *options, compiler, _version(compiler), made_with)]
    made_from = hashlib.sha256(bytes(1).join(texts)).hexdigest()[:16]
    name = f"{source.stem}-{processor.identity()}-{_short_name(compiler)}-{made_from}.so"
    if found := _sound_version(key, folder, name):
        return found
    with _locked(folder / f"{name}.lock"):
        if found := _sound_version(key, folder, name):
            return found
        for damaged in signed_versions(folder, name):
            damaged.unlink()
        temporary = temporary_name(folder / name)
        _compile([compiler, *OPTIONS, str(source), *options, "-o", str(temporary)], temporary)
        return publish_signed(key, temporary, name)


def _sound_version(key: bytes, folder: Path, name: str) -> Path | None:
    return next((path for path in signed_versions(folder, name) if is_sound(key, path)), None)


@functools.cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=TIMEOUT)
    return done.stdout.partition("\n")[0]


def _short_name(compiler: str) -> str:
    """The compiler and its version, as part of a file name."""
    number = re.search(r"\d+(\.\d+)+", _version(compiler))
    return re.sub(r"[^\w+.]", "_", f"{Path(compiler).name}_{number[0] if number else ''}")


def _compile(command: Sequence[str], result: Path) -> None:
    """Runs the compiler. If this process ends first, the compiler is killed and its output is removed."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:

        def stop() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also kills the programs that the compiler has started
            result.unlink(missing_ok=True)

        atexit.register(stop)
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            stop()
            raise
        finally:
            atexit.unregister(stop)
    if process.returncode:
        result.unlink(missing_ok=True)
        raise subprocess.CalledProcessError(process.returncode, command, stderr=output)


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Holds a lock that excludes other processes. After `TIMEOUT` it continues without: compiling twice is harmless."""
    deadline = time.monotonic() + TIMEOUT
    with open(os.open(lock, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
