"""Which platform the program that is being traced is for."""

import contextlib
import contextvars

import jax

_planned = contextvars.ContextVar("planned", default=False)


@contextlib.contextmanager
def for_an_accelerator():
    """What is traced inside is a plan of a program that runs on a GPU or TPU, though compiled on a CPU."""
    token = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(token)


def on_cpu() -> bool:
    """Whether the program will run on a CPU."""
    return jax.default_backend() == "cpu" and not _planned.get()
