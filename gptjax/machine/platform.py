"""The platform that the program being traced will run on."""

import contextlib
import contextvars
from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu", "planned"]
_planned = contextvars.ContextVar("planned", default=False)


@contextlib.contextmanager
def plan_for_accelerator():
    """Programs traced inside stand for programs of a GPU or TPU, though they are compiled on a CPU."""
    token = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(token)


def target_platform() -> Platform:
    """Where the program being traced will run; `planned`: on a GPU or TPU that is not here, see `gptjax plan`."""
    if _planned.get():
        return "planned"
    backend = jax.default_backend()
    assert backend in ("cpu", "gpu", "tpu")
    return backend
