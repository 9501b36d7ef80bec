"""Options of a run with several processes."""

import dataclasses
import re

from gptjax.config.rules import no_effect, not_negative, positive
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How processes find each other. SLURM, Open MPI, Kubernetes and TPU pods are detected; otherwise give each process
    the first three options. The run directory keeps none of these options.
    """

    coordinator: str = ""
    """HOST:PORT on which process 0 listens, the same for every process; empty: as detected."""
    num_processes: int = 0
    """Number of processes; needs coordinator."""
    process_id: int = -1
    """Number of this process, from 0; needs coordinator."""
    detect: bool = True
    """Detect a cluster manager and connect to the other processes of its job; false: run as a single process."""
    start_timeout: int = 300
    """Seconds to wait until all processes have connected."""
    lost_timeout: int = 30
    """Seconds without a heartbeat after which a process counts as lost and the others stop."""

    def __post_init__(self):
        positive("cluster", self, "start_timeout", "lost_timeout")
        not_negative("cluster", self, "num_processes")
        given = bool(self.coordinator)
        no_effect("cluster", self, "num_processes", given, "cluster.coordinator")
        no_effect("cluster", self, "process_id", given, "cluster.coordinator")
        no_effect("cluster", self, "detect", not given, "a cluster's own word (cluster.coordinator is given)")
        if not given:
            return
        if not re.fullmatch(r"\S+:\d{1,5}", self.coordinator):
            raise UserError(f"cluster.coordinator={self.coordinator!r} must be HOST:PORT of process 0, as node7:12345")
        positive("cluster", self, "num_processes")
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"cluster.process_id={self.process_id} must lie in [0, {self.num_processes}), one number for each of"
                f" cluster.num_processes={self.num_processes}"
            )
