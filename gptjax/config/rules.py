"""Checks that several config sections share; `section` is empty for options of a verb.

Each raises a `UserError` that names field, value and rule.
"""

import dataclasses
import os
import re
from pathlib import Path

from gptjax.errors import UserError

LARGEST_COUNT = 2**31 - 1
"""Largest integer: devices use 32-bit integers."""


def positive(section: str, config, *names: str) -> None:
    """Checks that integers are at least 1 and floats above 0, and that they are not too large."""
    for name in names:
        if getattr(config, name) <= 0:
            least = "above 0" if isinstance(getattr(config, name), float) else "at least 1"
            raise UserError(f"{_full(section, name)}={getattr(config, name)} must be {least}")
        _countable(section, config, name)


def not_negative(section: str, config, *names: str) -> None:
    """Checks that fields are at least 0 and not too large."""
    for name in names:
        if getattr(config, name) < 0:
            raise UserError(f"{_full(section, name)}={getattr(config, name)} must not be negative")
        _countable(section, config, name)


def fraction(section: str, config, *names: str) -> None:
    """Checks that fields are in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{_full(section, name)}={getattr(config, name)} must lie in [0, 1)")


def import_path(section: str, config, name: str) -> None:
    """Checks that a field is empty or has the form `module:function`."""
    value = getattr(config, name)
    if value and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value):
        raise UserError(
            f"{_full(section, name)}={value!r} must be module:function, such as my_file:my_function for my_file.py"
        )


def usable_paths(section: str, config, *names: str) -> None:
    """Checks that paths are valid on a file system, and that no path of a list is empty: it would be this folder."""
    for name in names:
        value = getattr(config, name)
        if "" in value and not isinstance(value, str):
            raise UserError(f"{_full(section, name)} holds an empty path; name a file or folder, or leave it out")
        for path in (value,) if isinstance(value, str) else value:
            usable_path(_full(section, name), path)


def local_folders(section: str, config, *names: str) -> None:
    """Rejects addresses such as gs://bucket/x, which would create a folder named `gs:`, and empty paths."""
    for name in names:
        if not getattr(config, name):
            raise UserError(f"{_full(section, name)} is empty; name a folder")
        if "://" in (value := getattr(config, name)):
            raise UserError(
                f"{_full(section, name)}={value!r} is an address; name a folder of this machine's file systems"
            )


def without_credentials(name: str, path: str) -> None:
    """Rejects an address with credentials or a signed query, because configs are stored and printed."""
    scheme, separator, rest = path.partition("://")
    if separator and ("@" in rest.partition("/")[0] or re.search(r"\?[^/]*=", rest)):
        raise UserError(
            f"{name}: an address of {scheme}:// holds a user name or a query with values; leave them out: credentials"
            " are read from the environment, or from fsspec's own configuration (~/.config/fsspec)"
        )


def usable_path(name: str, path: str) -> None:
    """Rejects a path with a NUL character, with an unpaired surrogate, or of an unknown user (`~nobody/x`)."""
    try:
        usable = b"\0" not in os.fsencode(Path(path).expanduser())
    except (RuntimeError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise UserError(f"{name}={path!r} is not a usable path; give one without NUL, and '~' without a name")


def not_empty(config, name: str) -> None:
    """Requires a path: an empty one would be the current folder."""
    if not getattr(config, name):
        raise UserError(f"{name} is empty; name a folder or file to write")


def page_file(config, name: str) -> None:
    """Requires the ending of a page for a file that a page is written to, so that it replaces no other kind of file."""
    if (path := getattr(config, name)) and not path.lower().endswith((".html", ".htm")):
        raise UserError(f"{name}={path!r} must end in .html")


def different_files(config, given: str, out: str) -> None:
    """Refuses to write over the file that is read."""
    paths = [getattr(config, name) for name in (given, out)]
    if all(paths) and len({Path(path).expanduser().resolve() for path in paths}) == 1:
        raise UserError(f"{out}={paths[1]!r} would replace the file of {given}; name another file")


def no_effect(section: str, config, name: str, active: bool, needs: str) -> None:
    """Rejects an option that differs from its default although it has no effect."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if not active and getattr(config, name) != default:
        value = getattr(config, name)
        option = _full(section, name)
        raise UserError(f"{option}={value!r} has no effect without {needs}; leave it at {default!r}", unused=option)


def _countable(section: str, config, name: str) -> None:
    if isinstance(getattr(config, name), int) and getattr(config, name) > LARGEST_COUNT:
        raise UserError(f"{_full(section, name)}={getattr(config, name)} must be at most {LARGEST_COUNT}")


def _full(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
