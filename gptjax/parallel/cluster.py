"""Several processes that are one run: how they start, what they must agree on, and what ends them.

`jax.distributed` does the work. All of them run the same program; process 0 alone writes what is not an array. An error
that all processes know of (`SharedError`) ends them one by one, as it ends a program. Any other error ends its process
at once, since the rest would wait for it for ever; they see that a connection closed, or that nothing was heard for
`cluster.lost_timeout`, say so in one line, and end with `EXIT_LOST`.
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

EXIT_LOST = 4  # status of a process that stopped because another one was lost
LOST_STATUS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
"""Statuses, with which messages of JAX's runtime begin, of a process that does not answer."""
LOST_WORDS = ("Gloo ", "oordination service", "remote process exited", "ncclRemoteError", "Connection closed")
"""What they contain when a collective finds a closed connection; other errors of NCCL are not of this kind."""
MOST_OF_A_CAUSE = 400  # characters that are shown of it
PIECE = 1024  # bytes; texts are gathered in multiples of it, so that few programs compile


class SharedError(UserError):
    """A user's error that was raised on every process."""


def found(environment: Mapping[str, str]) -> str:
    """Names the cluster that started this process as one of several; empty: none did."""

    def several(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    if "SLURM_STEP_NODELIST" in environment and several("SLURM_NTASKS"):
        return "SLURM"
    if "OMPI_MCA_orte_hnp_uri" in environment and several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if _has_tpus() and environment.get("JAX_PLATFORMS", "tpu") != "cpu":
        return "TPU pod"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return ""


@contextlib.contextmanager
def joined(config: ClusterConfig) -> Iterator[None]:
    """Joins the other processes of the run, if there are any; must come before JAX looks for its devices.

    Raises:
        UserError: The cluster does not say enough, or process 0 cannot listen.
    """
    cluster = "command line" if config.coordinator else found(os.environ) if config.detect else ""
    if not cluster or (config.coordinator and config.num_processes == 1):
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Two programs at once would take each other's messages: a CPU, unlike a GPU, has no order of its own for them.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `guard.Signals`
    _connect_directly()
    relay = _relay_errors(config)
    if not _initialize(config, cluster):
        yield
        return
    try:
        with guarded():
            gather("")  # connects all of them while none has anything else to do
            yield
    finally:  # all of them are here, because others would have ended at once
        jax.distributed.shutdown()
        sys.stderr.flush()
        os.dup2(relay, 2)


def is_first() -> bool:
    """Whether this process writes what only one of them must write."""
    return jax.process_index() == 0


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Ends this process at once on an error that the others do not share, before anything waits for them."""
    try:
        yield
    except SharedError:
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        _end(error)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is done inside is done by all processes or refused by all; nothing in it may wait for another process.

    Raises:
        SharedError: It was refused somewhere. The process in question says what it said, the others name it.
    """
    refusal = None
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        refusal = str(error)
    said = gather(refusal or "")
    if refusal:
        raise SharedError(refusal)
    for number, text in enumerate(said):
        if text:
            raise SharedError(f"process {number}: {text}")


def gather(text: str) -> list[str]:
    """Returns the text of every process, in their order. All of them must call it."""
    if jax.process_count() == 1:
        return [text]
    raw = text.encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(raw)))).reshape(-1)
    row = np.zeros(-(-max(1, sizes.max()) // PIECE) * PIECE, np.uint8)
    row[: len(raw)] = np.frombuffer(raw, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def require_same(facts: Mapping[str, object], hint: str) -> None:
    """Holds what this process has against what process 0 has.

    Raises:
        SharedError: Some fact differs; every process says the same line.
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
    """The largest number that any process gives, as all of them learn it one call later: so nobody waits for anybody.
    One process alone learns it at once.
    """

    def __init__(self):
        devices = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
        self._each = NamedSharding(devices, PartitionSpec("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(devices, PartitionSpec()))
        self._coming: jax.Array | None = None

    def __call__(self, number: int) -> int:
        """Gives a number and returns what is known by now, 0 at first."""
        if jax.process_count() == 1:
            return number
        known = 0 if self._coming is None else int(self._coming)
        shape, own = (jax.device_count(),), np.full(1, number, np.int32)
        self._coming = self._largest(jax.make_array_from_callback(shape, self._each, lambda _: own))
        return known


def _has_tpus() -> bool:
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _connect_directly() -> None:
    """Keeps gRPC from sending the messages between the processes through the machine's web proxy, which may hang."""
    os.environ.setdefault("grpc_proxy", "")  # comes before http_proxy and https_proxy; empty: no proxy
    jax.config.update("jax_check_proxy_envs", False)  # JAX's warning about just that


def _initialize(config: ClusterConfig, cluster: str) -> bool:
    """Starts `jax.distributed`; false where a TPU turns out to be no part of a pod."""
    told = {"coordinator_address": config.coordinator, "num_processes": config.num_processes}
    told |= {"process_id": config.process_id, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            **(told if config.coordinator else {}),
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
    """Puts a relay (see relay.py) before standard error; returns the standard error that was."""
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
        "another process of this run ended or cannot be reached, so this one stops; start all of them again, as many as"
        " you like: the run goes on from its newest checkpoint"
    )


def is_lost(error: BaseException) -> bool:
    """Whether an error of JAX's runtime means that another process ended or cannot be reached."""
    status, _, text = str(error).partition(": ")
    # A compiled program raises what the runtime says as a ValueError.
    of_runtime = isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and not isinstance(error, UserError)
    return of_runtime and (status in LOST_STATUS or (status.isupper() and any(word in text for word in LOST_WORDS)))


def _end(error: BaseException) -> None:
    status, line = 2, one_line(error)
    if is_lost(error):
        status, line = EXIT_LOST, f"{_lost()} (the error was: {' '.join(str(error).split())[:MOST_OF_A_CAUSE]})"
    if line is None:
        status = 1
        traceback.print_exception(error)
    else:
        print(f"gptjax: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
