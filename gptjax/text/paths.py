"""Files, folders and patterns → files."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gptjax.errors import UserError, did_you_mean
from gptjax.text.formats import NAMED_ENDINGS, ending
from gptjax.text.remote import File, find_remote, is_address
from gptjax.text.streams import COMPRESSIONS


def find_files(paths: Sequence[str], option: str, endings: Sequence[str], counts: Counter[str]) -> list[File]:
    """Finds files from paths of files, folders (searched recursively), globs and addresses. Returns each file once.

    Hidden files and folders inside folders are ignored. Files in folders and from globs whose ending is not in
    `endings` are counted as "unknown_files"; a file that is named directly must have one of the endings. Files with an
    ending of `NAMED_ENDINGS` are only read if they are named directly.

    Args:
        paths: The user's paths.
        option: The option of the paths ("data.path"), for error messages.
        endings: Supported file endings.
        counts: Incremented at "unknown_files".

    Returns:
        Files in the order of `paths`; those of one folder or pattern are sorted.

    Raises:
        UserError: A path does not exist or has an unknown kind, or no file is found.
    """
    found: dict[tuple[int, int] | str, File] = {}
    for given in paths:
        path = Path(given).expanduser()
        readable = [kind for kind in endings if kind not in NAMED_ENDINGS or kind == ending(path)]
        files = find_remote(given, option) if is_address(given) else _files_of(given, path, option)
        for file in sorted(files, key=lambda file: file.parts):
            if ending(file) in readable and (not isinstance(file, Path) or file.is_file()):
                found.setdefault(_identity(file), file)
            elif str(file) in (given, str(path)):
                raise UserError(
                    f"{option}: {given}: ending {file.suffix!r} is not one of {' '.join(endings)},"
                    f" each also {' or '.join(COMPRESSIONS)}.{did_you_mean(ending(file), endings)}"
                )
            else:
                counts["unknown_files"] += 1
    if not found:
        raise UserError(
            f"{option}: {', '.join(paths)}: no file ends in one of {' '.join(endings)}"
            f" ({counts['unknown_files']} other files are there)"
        )
    return list(found.values())


def _identity(file: File) -> tuple[int, int] | str:
    if not isinstance(file, Path):
        return str(file)
    stat = file.stat()
    return stat.st_dev, stat.st_ino


def refuse_links_out(root: Path, paths: Iterable[Path]) -> None:
    """Checks that links do not point outside the given folder: an unpacked archive can contain a link to anywhere.

    Raises:
        UserError: A link points outside; the message names the first one.
    """
    for path in paths:
        if path.is_symlink():
            try:
                target = Path(os.path.realpath(path))
            except OSError as error:
                raise UserError(f"{path}: a link that cannot be read: {error.strerror}") from None
            if not target.is_relative_to(root):
                raise UserError(
                    f"{path}: a link that leads out of its folder, to {target};"
                    " to read it, name it in data.path itself or by a pattern"
                )


def _files_of(given: str, path: Path, option: str) -> Iterator[Path]:
    if os.path.exists(path):
        matches = [path]
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        if not matches:
            near = did_you_mean(path.name, _names_in(path.parent))
            raise UserError(f"{option}: {given}: no such file or folder, and no match as a pattern.{near}")
    for match in matches:
        yield from _files_below(match) if match.is_dir() else [match]


def _files_below(folder: Path) -> Iterator[Path]:
    seen, root = set(), Path(os.path.realpath(folder))
    for parent, folders, names in os.walk(folder, onerror=_cannot_list, followlinks=True):
        identity = os.path.realpath(parent)
        if identity in seen:  # a link to a parent folder, which would loop forever
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        refuse_links_out(root, (*files, *(Path(parent, name) for name in folders)))
        yield from files


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
