"""Options of verify-resume."""

import dataclasses

from gptjax.config.rules import not_negative, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyResumeConfig:
    """How a run is killed and resumed; options of the run itself may follow, as for train."""

    steps: int = 20
    """Steps of the killed run and of the one that it is compared with."""
    save_every: int = 4
    """Steps between checkpoints."""
    kills: int = 4
    """Number of SIGKILLs at random moments, before the run may finish."""
    kill_seed: int = 0
    """Random seed of the moments."""

    def __post_init__(self):
        positive("", self, "steps", "save_every", "kills")
        not_negative("", self, "kill_seed")
