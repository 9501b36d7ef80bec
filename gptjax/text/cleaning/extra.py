"""Libraries of the extra `clean`, imported where a stage needs one."""

import importlib
from importlib import metadata
from types import ModuleType

from gptjax.errors import UserError


def require(module: str) -> ModuleType:
    """Imports a library of the extra.

    Raises:
        UserError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"data.clean needs the library {module.partition('.')[0]} ({error}): pip install 'gptjax[clean]'"
        ) from None


def version(library: str) -> str:
    """Version of an installed library; empty: it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""
