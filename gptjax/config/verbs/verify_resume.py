"""Options of verify-resume."""

import dataclasses

from gptjax.config.rules import not_negative, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyResumeConfig:
    """Kills and resumes a short run; options of the run may follow, as for train."""

    steps: int = 20
    """Number of steps of the killed run and of the uninterrupted run."""
    save_every: int = 4
    """Number of steps between checkpoints."""
    kills: int = 4
    """Number of SIGKILLs at random times, before the run may finish."""
    kill_seed: int = 0
    """Random seed of these times."""

    def __post_init__(self):
        positive("", self, "steps", "save_every", "kills")
        not_negative("", self, "kill_seed")
