"""Options of sweep."""

import dataclasses

from gptjax.config.rules import positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Options of a sweep; options of its runs may follow, as for train."""

    parallel: int = 1
    """Number of runs that train at the same time, each in its own process. With --slurm, of tasks; 1: no limit."""
    slurm: bool = False
    """Train nothing; write a SLURM array of the unfinished runs, which sbatch starts."""

    def __post_init__(self):
        positive("", self, "parallel")
