"""Loads the user's functions, which the config names by import path."""

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.errors import UserError


@functools.cache
def load_function(path: str, option: str) -> Callable[..., Any]:
    """Imports `module:function`. The current folder is searched after the installed modules.

    Args:
        path: The value of the option.
        option: Name of the option, for error messages.

    Raises:
        UserError: There is no such module or function, or importing it fails.
    """
    module, _, name = path.partition(":")
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise UserError(
            f"{option}={path!r}: {module} cannot be imported from {folder}: {short_reason(error)}"
        ) from error
    finally:
        sys.path.remove(folder)
    if not callable(found):
        raise UserError(f"{option}={path!r}: {module} has no function {name!r}")
    return found


def short_reason(error: Exception) -> str:
    """Class of an error and the beginning of its message, on one line."""
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:200]
