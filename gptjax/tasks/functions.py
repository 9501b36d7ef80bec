"""Functions of the user's own, named in the config by import path."""

import functools
import importlib
import math
import sys
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.metric import ScoresWithMetric


@functools.cache
def load_function(path: str, option: str) -> Callable[..., Any]:
    """The function that `module:function` names; the current folder is searched after the installed modules.

    Args:
        path: As in the config.
        option: The option that names it, for error messages.

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
            f"{option}={path!r}: {module} cannot be imported from {folder}: {type(error).__name__}: {_line(error)}"
        ) from error
    finally:
        sys.path.remove(folder)
    if not callable(found):
        raise UserError(f"{option}={path!r}: {module} has no function {name!r}")
    return found


def call_function(path: str, option: str, *values: Any, where: str = "") -> Any:
    """Calls the function; an error of its own is told with the line that raised it.

    Raises:
        UserError: The function raised an error.
    """
    function = load_function(path, option)
    try:
        return function(*values)
    except UserError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        prefix = f"{where}: " if where else ""
        raise UserError(
            f"{prefix}{option}={path!r} raised {type(error).__name__}: {_line(error)} ({frame.filename}:{frame.lineno})"
        ) from error


def metric_values(task: TaskConfig, predictions: Any) -> dict[str, float]:
    """What the function of `task.metric` says of predictions; nothing where there is none.

    Raises:
        UserError: It returned something other than a finite number, or a dict of such.
    """
    if not task.metric:
        return {}
    found = call_function(task.metric, "task.metric", *predictions.named())
    values = found if isinstance(found, dict) else {"metric": found}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(
                f"task.metric={task.metric!r} returned {name!r}: {value!r}; must return a finite number, or a dict from"
                " names to such"
            )
    return {name: float(value) for name, value in values.items()}


def with_metric(task: TaskConfig, predictions: Any, scores: Any) -> Any:
    """Scores together with those of `task.metric`.

    Raises:
        UserError: It has a name that the scores have too.
    """
    values = metric_values(task, predictions)
    if both := values.keys() & scores.row().keys():
        raise UserError(f"task.metric={task.metric!r} returned {min(both)!r}, which is a score of the task; rename it")
    return ScoresWithMetric(scores, values) if values else scores


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
