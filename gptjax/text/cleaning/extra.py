"""Imports the libraries of the extras `clean` and `collect` when a stage or a reader needs one."""

import importlib
from importlib import metadata
from types import ModuleType

from gptjax.errors import UserError


class MissingLibrary(UserError):
    """A library of an extra is not installed."""


def require(module: str, user: str = "data.clean", extra: str = "clean") -> ModuleType:
    """Imports a library of an extra, which `user` needs.

    Raises:
        MissingLibrary: The message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingLibrary(
            f"{user} needs the library {module.partition('.')[0]} ({error}): pip install 'gptjax[{extra}]'"
        ) from None


def version(library: str) -> str:
    """Version of an installed library; empty if it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""
