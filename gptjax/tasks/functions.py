"""Calls the user's functions that a config names: metrics, losses, rewards."""

import math
import traceback
from numbers import Real
from typing import Any

from gptjax.config.functions import load_function, short_reason
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.metric import ScoresWithMetric


def call_function(path: str, option: str, *values: Any, where: str = "") -> Any:
    """Calls the function named by `path`.

    Raises:
        UserError: The function raised an error; the message names the line.
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
            f"{prefix}{option}={path!r} raised {short_reason(error)} ({frame.filename}:{frame.lineno})"
        ) from error


def metric_values(task: TaskConfig, predictions: Any) -> dict[str, float]:
    """The scores that the function of `task.metric` returns for predictions; empty if it is not set.

    Raises:
        UserError: The function returned something other than a finite number or a dict of finite numbers.
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
    """Adds the scores of `task.metric` to `scores`.

    Raises:
        UserError: Both have a score of the same name.
    """
    values = metric_values(task, predictions)
    if both := values.keys() & scores.row().keys():
        raise UserError(f"task.metric={task.metric!r} returned {min(both)!r}, which is a score of the task; rename it")
    return ScoresWithMetric(scores, values) if values else scores
