"""Cleans the parts of a corpus in this process, in several processes, or on the workers of a Dask cluster.

Each part is one task that writes one file, complete or not at all, so a task that is lost with its process can run
again anywhere. Every worker must see the folder of the parts.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gptjax.config.data import DataConfig
from gptjax.config.reader import from_dict, to_dict
from gptjax.errors import UserError
from gptjax.machine.processor import core_count
from gptjax.text.cleaning.extra import require
from gptjax.text.cleaning.part import clean_part
from gptjax.text.cleaning.stages import Stage, make_stages
from gptjax.text.formats import Document

LOCAL_CLUSTER = "local"
"""The value of data.clean.dask that starts a cluster on this machine."""


class Task(Protocol):
    """A part that is being cleaned."""

    def result(self) -> Any:
        """Waits for the end; raises the error of the task."""


class Pool(NamedTuple):
    """Cleans parts, some at a time."""

    submit: Callable[[Path, list[Document]], Task]
    size: int


@contextlib.contextmanager
def open_pool(data: DataConfig) -> Iterator[Pool]:
    """Yields the pool that the options ask for; processes start with the first parts.

    Raises:
        UserError: A stage cannot be made, a library is missing, or no Dask scheduler answers.
    """
    stages = make_stages(data)  # its errors are raised here, once
    n = data.clean.workers or core_count()
    opened = _dask(data, n) if data.clean.dask else _this_process(data, stages) if n == 1 else _processes(data, n)
    with opened as pool:
        yield pool


def clean_task(options: str, path: str, documents: list[tuple[str, str]]) -> None:
    """Cleans a part, by options as JSON. A process makes its stages once."""
    data, stages = _made(options)
    part = [Document(*document) for document in documents]
    clean_part(Path(path), part, stages, data.clean.near_duplicates > 0)


@functools.lru_cache(maxsize=4)
def _made(options: str) -> tuple[DataConfig, list[Stage]]:
    data = from_dict(DataConfig, json.loads(options), "data")
    return data, make_stages(data)


@contextlib.contextmanager
def _this_process(data: DataConfig, stages: list[Stage]) -> Iterator[Pool]:
    near = data.clean.near_duplicates > 0
    with ThreadPoolExecutor(1) as executor:
        yield Pool(lambda path, documents: executor.submit(clean_part, path, documents, stages, near), 1)


@contextlib.contextmanager
def _dask(data: DataConfig, n: int) -> Iterator[Pool]:
    """Dask runs a task again whose worker was lost, up to its `distributed.scheduler.allowed-failures`."""
    distributed = require("distributed", "data.clean.dask", "dask")
    options, local = json.dumps(to_dict(data)), data.clean.dask == LOCAL_CLUSTER
    with contextlib.ExitStack() as stack:
        place = data.clean.dask
        if local:
            cluster = distributed.LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=None)
            place = stack.enter_context(cluster)
        try:
            client = stack.enter_context(distributed.Client(place, timeout="30s"))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"data.clean.dask={data.clean.dask}: no scheduler answers there: {reason}") from None
        size = max(1, sum(client.nthreads().values()))

        def submit(path: Path, documents: list[Document]) -> Task:
            texts = [tuple(document) for document in documents]
            return client.submit(_dask_task, options, str(path.resolve()), texts, pure=False)

        yield Pool(submit, size)


def _dask_task(options: str, path: str, documents: list[tuple[str, str]]) -> None:
    if not Path(path).parent.is_dir():
        raise UserError(
            f"{path}: a Dask worker does not see this folder; put cache_dir on a file system that all share"
        )
    clean_task(options, path, documents)


@contextlib.contextmanager
def _processes(data: DataConfig, n: int) -> Iterator[Pool]:
    processes: list[subprocess.Popen[str]] = []
    free: list[subprocess.Popen[str]] = []

    def clean(path: Path, documents: list[Document]) -> None:
        process = free.pop() if free else _start(data, processes)
        answer = _ask(process, [str(path), documents])
        free.append(process)
        if "error" in answer:
            raise UserError(answer["error"])

    with ThreadPoolExecutor(n) as executor:
        try:
            yield Pool(lambda path, documents: executor.submit(clean, path, documents), n)
        except BaseException:
            for process in processes:
                process.kill()
            executor.shutdown(cancel_futures=True)
            raise
        finally:
            for process in processes:
                assert process.stdin and process.stdout
                with contextlib.suppress(OSError):
                    process.stdin.close()
                process.wait()
                process.stdout.close()


def _start(data: DataConfig, processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "gptjax.text.cleaning.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )
    processes.append(process)
    assert process.stdin
    process.stdin.write(json.dumps(to_dict(data)) + "\n")
    return process


def _ask(process: subprocess.Popen[str], message: Any) -> dict[str, str]:
    assert process.stdin and process.stdout
    try:
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:
        answer = ""
    if not answer:
        raise UserError(
            f"a process that cleans text ended with status {process.wait()}; the parts that are finished are kept:"
            " start again, with a lower data.clean.workers if memory was short"
        )
    return json.loads(answer)
