"""The platform that the program being traced will run on."""

import contextlib
import contextvars
from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu", "planned"]
_planned = contextvars.ContextVar("planned", default=False)


@contextlib.contextmanager
def plan_for_accelerator():
    """Traces programs as for a GPU or TPU, although they are compiled on a CPU."""
    token = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(token)


def target_platform() -> Platform:
    """Platform of the program being traced; `planned`: a GPU or TPU of another machine (`gptjax plan`)."""
    if _planned.get():
        return "planned"
    backend = jax.default_backend()
    assert backend in ("cpu", "gpu", "tpu")
    return backend
