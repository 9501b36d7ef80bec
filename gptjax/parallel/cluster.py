"""Runs of several processes: starting them, keeping them consistent, and ending all of them when one fails.

`jax.distributed` connects the processes. All of them run the same program; only process 0 writes files that are not
arrays. An error that every process raises (`SharedError`) ends each of them like any other user error. Any other error
ends its process at once, because the others would otherwise wait for it forever. The others notice the closed
connection, or receive nothing for `cluster.lost_timeout` seconds; they print one line and exit with `EXIT_LOST`.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.config.cluster import ClusterConfig
from gptjax.errors import UserError, one_line

EXIT_LOST = 4  # exit status of a process that stopped because another one was lost
LOST_STATUS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
"""A message of JAX's runtime begins with one of these if another process does not answer."""
LOST_WORDS = ("Gloo ", "oordination service", "remote process exited", "ncclRemoteError", "Connection closed")
"""A message contains one of these if a collective found a closed connection; other NCCL errors contain none."""
MAX_CAUSE_LENGTH = 400  # characters of the original error that are shown
PIECE = 1024  # bytes; texts are padded to a multiple of it, so that few programs are compiled


class SharedError(UserError):
    """A user error that every process raises."""


def detect(environment: Mapping[str, str]) -> str:
    """Returns the name of the cluster manager that started this process as one of several; empty: none did."""

    def more_than_one(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    if "SLURM_STEP_NODELIST" in environment and more_than_one("SLURM_NTASKS"):
        return "SLURM"
    if "OMPI_MCA_orte_hnp_uri" in environment and more_than_one("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if _has_tpus() and environment.get("JAX_PLATFORMS", "tpu") != "cpu":
        return "TPU pod"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return ""


@contextlib.contextmanager
def joined(config: ClusterConfig) -> Iterator[None]:
    """Connects to the other processes of the run, if there are any; must be called before JAX looks for devices.

    Raises:
        UserError: The cluster manager gives too little information, or process 0 cannot listen on its port.
    """
    cluster = "command line" if config.coordinator else detect(os.environ) if config.detect else ""
    if not cluster or (config.coordinator and config.num_processes == 1):
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A CPU, unlike a GPU, does not order programs, so two that run at once would receive each other's messages.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `guard.Signals`
    _connect_directly()
    relay = _relay_errors(config)
    if not _initialize(config, cluster):
        yield
        return
    try:
        with exit_on_unshared_error():
            gather("")  # opens all connections before any process starts to work
            yield
    finally:  # every process gets here: a process that fails alone exits at once
        jax.distributed.shutdown()
        sys.stderr.flush()
        os.dup2(relay, 2)


def is_first() -> bool:
    """Whether this process writes the files that only one process may write."""
    return jax.process_index() == 0


@contextlib.contextmanager
def exit_on_unshared_error() -> Iterator[None]:
    """Exits this process at once on an error that the others do not raise, without waiting for them."""
    try:
        yield
    except SharedError:
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _end(error)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Raises a user error of the block on every process, if one process raised it. The block must not wait for others.

    Raises:
        SharedError: A process raised a `UserError`. The other processes raise its message with the process number.
    """
    refusal = None
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        refusal = str(error)
    refusals = gather(refusal or "")
    if refusal:
        raise SharedError(refusal)
    for number, text in enumerate(refusals):
        if text:
            raise SharedError(f"process {number}: {text}")


def gather(text: str) -> list[str]:
    """Returns the text of every process, ordered by process number. All processes must call it."""
    if jax.process_count() == 1:
        return [text]
    raw = text.encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(raw)))).reshape(-1)
    row = np.zeros(-(-max(1, sizes.max()) // PIECE) * PIECE, np.uint8)
    row[: len(raw)] = np.frombuffer(raw, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def require_same(facts: Mapping[str, object], hint: str) -> None:
    """Compares the facts of all processes with those of process 0.

    Raises:
        SharedError: A fact differs; every process raises the same message.
    """
    first, *others = [json.loads(text) for text in gather(json.dumps(facts))]
    for number, other in enumerate(others, 1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise SharedError(
                    f"the processes disagree on {name}: {first.get(name)!r} on process 0, {other.get(name)!r} on"
                    f" process {number}; {hint}"
                )


class Agreement:
    """Maximum of one number over all processes, delayed by one call so that no process waits for another.

    With a single process there is no delay.
    """

    def __init__(self):
        devices = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
        self._each = NamedSharding(devices, PartitionSpec("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(devices, PartitionSpec()))
        self._pending: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Contributes a number; returns the maximum of the previous call's numbers, 0 in the first call."""
        if jax.process_count() == 1:
            return number
        known = 0 if self._pending is None else int(self._pending)
        shape, own = (jax.device_count(),), np.full(1, number, np.int32)
        self._pending = self._largest(jax.make_array_from_callback(shape, self._each, lambda _: own))
        return known


def _has_tpus() -> bool:
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _connect_directly() -> None:
    """Keeps gRPC from routing messages between processes through the machine's web proxy, which may hang."""
    os.environ.setdefault("grpc_proxy", "")  # takes precedence over http_proxy and https_proxy; empty: no proxy
    jax.config.update("jax_check_proxy_envs", False)  # turns off JAX's warning about proxies


def _initialize(config: ClusterConfig, cluster: str) -> bool:
    """Starts `jax.distributed`; returns False if a TPU turns out not to be part of a pod."""
    options = {"coordinator_address": config.coordinator, "num_processes": config.num_processes}
    options |= {"process_id": config.process_id, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            **(options if config.coordinator else {}),
            initialization_timeout=config.start_timeout,
            heartbeat_timeout_seconds=config.lost_timeout,
            shutdown_timeout_seconds=config.start_timeout,
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        if cluster == "TPU pod" and "coordinator_address should be defined" in str(error):
            return False
        advice = "choose another port" if "RPC server" in str(error) else "give --cluster.coordinator and the rest"
        raise UserError(f"the processes of {cluster} cannot be joined: {error}; {advice}") from None
    return True


def _relay_errors(config: ClusterConfig) -> int:
    """Redirects standard error through a relay (see relay.py); returns the original file descriptor."""
    before = os.dup(2)
    who = "gptjax: " if config.process_id < 0 else f"gptjax: process {config.process_id} of {config.num_processes}: "
    late = f"{who}not all processes came within cluster.start_timeout={config.start_timeout} seconds"
    late += f" to {config.coordinator}" if config.coordinator else ""
    late += "; start every one of them, with the same coordinator"
    command = [sys.executable, "-S", str(Path(__file__).with_name("relay.py")), f"gptjax: {_lost()}", late]
    relay = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert relay.stdin is not None
    sys.stderr.flush()
    os.dup2(relay.stdin.fileno(), 2)
    relay.stdin.close()
    relay.returncode = 0  # it ends by itself, after this process
    return before


def _lost() -> str:
    return (
        "another process of this run ended or cannot be reached, so this one stops; start the run again, with any"
        " number of processes: it resumes from its newest checkpoint"
    )


def is_lost(error: BaseException) -> bool:
    """Whether an error of JAX's runtime means that another process ended or cannot be reached."""
    status, _, text = str(error).partition(": ")
    # A compiled program raises errors of the runtime as ValueError.
    of_runtime = isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and not isinstance(error, UserError)
    return of_runtime and (status in LOST_STATUS or (status.isupper() and any(word in text for word in LOST_WORDS)))


def _end(error: BaseException) -> None:
    status, line = 2, one_line(error)
    if is_lost(error):
        status, line = EXIT_LOST, f"{_lost()} (the error was: {' '.join(str(error).split())[:MAX_CAUSE_LENGTH]})"
    if line is None:
        status = 1
        traceback.print_exception(error)
    else:
        print(f"gptjax: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
