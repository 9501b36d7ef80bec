"""Scores and losses of the user's own, by functions that the config names."""

import math
import traceback
from numbers import Real
from typing import Any

from gptjax.config.functions import load_function, short_reason
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.evaluation.metric import ScoresWithMetric


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
            f"{prefix}{option}={path!r} raised {short_reason(error)} ({frame.filename}:{frame.lineno})"
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
