"""Libraries in C++, compiled where they run, for the processor they run on, and kept with the compiled programs."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from gptjax.files import publish, temporary_name
from gptjax.machine.compile_cache import is_sound, sign

SWITCH = "GPTJAX_NATIVE"
"""Where this is 0 nothing is compiled."""
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")


def find() -> str | None:
    """The user's compiler, if there is one."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")


def library(
    compiler: str, source: Path, headers: Sequence[Path], options: Sequence[str], made_with: str, folder: Path
) -> Path:
    """The library of a source, in `folder`; it is made if it is not there for this compiler, or is damaged.

    Args:
        made_with: What else it depends on.

    Raises:
        OSError: It cannot be written.
        SubprocessError: The compiler failed.
    """
    texts = [path.read_bytes() for path in (source, *headers)]
    texts += [text.encode() for text in (*OPTIONS, *options, compiler, made_with)]
    path = folder / f"{source.stem}-{hashlib.sha256(bytes(1).join(texts)).hexdigest()[:16]}.so"
    if not is_sound(path):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        command = [compiler, *OPTIONS, str(source), *options, "-o", str(temporary)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        publish(temporary, path)
        sign(path)
    return path
