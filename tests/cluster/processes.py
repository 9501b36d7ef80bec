"""Starts several trainer processes of one run on this machine."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptjax.config.run import Config
from tests.faults.runs import environment

LOSSES = 1e-5  # largest relative difference of losses: float32, summed in another order


def devices_each(number: int) -> dict[str, str]:
    """Environment of a process with this number of devices."""
    return environment(JAX_NUM_CPU_DEVICES=str(number))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Processes:
    """Processes of a run, started by hand; their output lies beside the config, a file for each and each stream.

    `own` has further flags of single processes, `folders` the folders in which they start.
    """

    def __init__(self, config: Path, number: int, devices: int = 1, flags: Sequence[str] = (), own=None, folders=None):
        self._folder, self._name = config.parent, config.stem
        port, own, folders = free_port(), own or {}, folders or {}
        self.running = []
        for process in range(number):
            told = ("--cluster.coordinator", f"127.0.0.1:{port}", "--cluster.num_processes", str(number))
            command = [sys.executable, "-m", "gptjax", "train", str(config), *told, "--cluster.process_id"]
            command += [str(process), "--cluster.lost_timeout", "600", *flags, *own.get(process, ())]
            with open(self._file(process, "out"), "w") as out, open(self._file(process, "err"), "w") as err:
                where = {"cwd": folders.get(process), "env": devices_each(devices)}
                self.running.append(subprocess.Popen(command, stdout=out, stderr=err, **where))

    def wait(self, timeout: float = 300) -> list[int]:
        """Waits for all of them; their exit statuses."""
        return [process.wait(timeout) for process in self.running]

    def out(self, process: int) -> str:
        """What a process has printed."""
        return self._file(process, "out").read_text()

    def error(self, process: int) -> str:
        """What a process has said on standard error, without jaxlib's notes."""
        return self._file(process, "err").read_text()

    def _file(self, process: int, stream: str) -> Path:
        return self._folder / f"{self._name}.{process}.{stream}"


@contextlib.contextmanager
def started(config: Path, number: int, devices: int = 1, **options) -> Iterator[Processes]:
    """Starts processes, and kills those that remain at the end."""
    processes = Processes(config, number, devices, **options)
    try:
        yield processes
    finally:
        for process in processes.running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def run(config: Path, number: int, devices: int = 1, **options) -> Processes:
    """Runs processes to their end; they must succeed."""
    with started(config, number, devices, **options) as processes:
        statuses = processes.wait()
    assert statuses == [0] * number, [processes.error(process) for process in range(number)]
    return processes


def wait_for_rows(config: Config, rows: int, processes: Processes, timeout: float = 240) -> None:
    """Waits until a run has logged this number of rows."""
    path, deadline = Path(config.run_dir) / "metrics.jsonl", time.monotonic() + timeout
    while not (path.exists() and path.read_bytes().count(b"\n") >= rows):
        statuses = [process.poll() for process in processes.running]
        assert time.monotonic() < deadline and set(statuses) == {None}, (statuses, processes.error(0))
        time.sleep(0.02)


def largest_difference(actual: list[dict], expected: list[dict], name: str = "loss") -> float:
    """The largest relative difference of a metric, over rows that must be of the same steps."""
    pairs = [[(row["step"], row[name]) for row in table if name in row] for table in (actual, expected)]
    assert [step for step, _ in pairs[0]] == [step for step, _ in pairs[1]]
    return max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(*pairs, strict=True))
