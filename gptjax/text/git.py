"""Git repositories → the text files of their HEAD. The program `git` reads them; no code of a repository is run."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from gptjax.errors import UserError

PREFIX = "git:"
"""Prefix of an entry of data.path that names a repository: git:FOLDER."""
_BINARY_BYTES = 8000
"""A file with a NUL in this many first bytes is binary, as in git."""
_VENDORED = re.compile(
    r"(^|/)(vendor|vendors|node_modules|bower_components|third[_-]?party|external|externals|dist|deps|_vendor|Godeps)/"
    r"|\.min\.(js|css)$|(^|/)(package-lock\.json|yarn\.lock|Cargo\.lock|poetry\.lock|go\.sum)$|-?\.bundle\.js$"
)
"""Vendored and generated files, from the list of GitHub's linguist (lib/linguist/vendor.yml)."""


class Repository(NamedTuple):
    """A repository at one commit."""

    folder: Path
    commit: str
    """Hash of HEAD."""


def find_repositories(paths: Sequence[str]) -> list[Repository]:
    """Returns the repositories among the entries of `data.path`.

    Raises:
        UserError: A folder is no repository, or it has no commit.
    """
    found = []
    for path in paths:
        if path.startswith(PREFIX):
            folder = Path(path.removeprefix(PREFIX)).expanduser()
            found.append(Repository(folder, _git(folder, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()))
    return found


def read_repository(
    repository: Repository, endings: Sequence[str], decode: Callable[[bytes, str], str | None], counts: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yields `(text, where)` of each file of the commit, in git's order.

    Args:
        repository: Result of `find_repositories`.
        endings: Endings of files to read, such as ".py"; empty: all.
        decode: Decodes UTF-8 by the policy `data.invalid_utf8`; returns None to leave the file out.
        counts: Incremented at "unknown_files" (other endings, links, submodules), "vendored_files" and "binary_files".

    Raises:
        UserError: git fails.
    """
    folder = repository.folder
    wanted = []
    for entry in _git(folder, "ls-tree", "-r", "-z", "--full-tree", repository.commit).split(b"\0")[:-1]:
        about, _, raw_path = entry.partition(b"\t")
        mode, _, blob = about.decode().split(" ")
        path = raw_path.decode("utf-8", "replace")
        if mode not in ("100644", "100755") or (endings and PurePosixPath(path).suffix.lower() not in endings):
            counts["unknown_files"] += 1
        elif _VENDORED.search(path):
            counts["vendored_files"] += 1
        else:
            wanted.append((blob, path))
    with subprocess.Popen(
        **_command(folder, "cat-file", "--batch"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        for blob, path in wanted:
            process.stdin.write(f"{blob}\n".encode())
            process.stdin.flush()
            head = process.stdout.readline().split()
            content = process.stdout.read(int(head[2]) + 1)[:-1] if len(head) == 3 else b""
            if len(head) != 3 or len(content) != int(head[2]):
                raise UserError(f"{PREFIX}{folder}: {path}: git cannot read this file; run git fsck")
            if b"\0" in content[:_BINARY_BYTES]:
                counts["binary_files"] += 1
                continue
            text = decode(content, where := f"{PREFIX}{folder}:{path}")
            if text is not None:
                yield text.removeprefix("\ufeff"), where


def _command(folder: Path, *words: str) -> dict[str, Any]:
    """Arguments for `subprocess`: git runs no program that the repository's configuration names, and fetches nothing
    that a partial clone lacks.
    """
    options = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
    closed = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1"}
    return {"args": ["git", *options, "-C", str(folder), *words], "env": os.environ | closed}


def _git(folder: Path, *words: str) -> bytes:
    try:
        done = subprocess.run(**_command(folder, *words), capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{PREFIX}{folder}: needs the program git; install it") from None
    if done.returncode:
        reason = " ".join(done.stderr.decode("utf-8", "replace").split())[:200]
        raise UserError(f"data.path: {PREFIX}{folder}: not a git repository with a commit: {reason}")
    return done.stdout
