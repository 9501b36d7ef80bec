"""Recognises errors that mean that another process was lost, and shows their cause."""

import os

import jax
import pytest

from gptjax.errors import UserError
from gptjax.parallel import cluster

GLOO = "FAILED_PRECONDITION: Gloo all-reduce failed: [pair.cc:534] Connection closed by peer [127.0.0.1]:51334"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError(GLOO), True),
        (ValueError("UNKNOWN: Gloo all-reduce failed: Read error: Connection reset by peer"), True),
        (ValueError("Gloo is no name of a task"), False),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses"), True),
        (jax.errors.JaxRuntimeError("CANCELLED: the step was cancelled"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed: remote process exited"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed: invalid argument"), False),
        (jax.errors.JaxRuntimeError("INTERNAL: the kernel was CANCELLED"), False),
        (RuntimeError("UNAVAILABLE: no libtpu"), False),
        (UserError("NCCL_CANCELLED.jsonl: no such file"), False),
    ],
)
def test_only_connection_errors_of_the_runtime_mean_a_lost_process(error, lost, monkeypatch, capsys):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    assert cluster.is_lost(error) == lost
    cluster._end(error)
    said = capsys.readouterr().err
    assert str(error) in said, "the cause is shown in any case"
    assert said.startswith("gptjax: another process of this run ended or cannot be reached") == lost
    assert statuses == [cluster.EXIT_LOST if lost else 2 if isinstance(error, UserError) else 1]
    assert not lost or said.count("\n") == 1
