"""Options of sweep."""

import dataclasses

from gptjax.config.rules import positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How the runs of a sweep are started; options of the runs may follow, as for train."""

    parallel: int = 1
    """Runs at a time; each is a process of its own. With --slurm: at most so many tasks at a time, 1: no limit."""
    slurm: bool = False
    """Train nothing; write a SLURM array of the runs that are not finished, to be given to sbatch."""

    def __post_init__(self):
        positive("", self, "parallel")
