"""Options of scaling-fit."""

import dataclasses

from gptjax.config.rules import no_effect, not_negative, page_file, positive, usable_paths
from gptjax.config.verbs.plan import CHIP_NAMES
from gptjax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingFitConfig:
    """The runs that a law is fitted to, and the larger run that it predicts."""

    runs: tuple[str, ...] = ()
    """Run directories, or folders that hold them, such as that of a sweep; the option's name may be left out."""
    hold_out: str = ""
    """Name of the run that is left out of the fit and predicted; empty: the one that took the most computation."""
    bootstrap: int = 200
    """Fits to runs drawn with replacement, of which the confidence intervals are made."""
    seed: int = 0
    """Random seed of the bootstrap."""
    params: float = 0.0
    """Parameters in matmuls of a larger model, such as 124e6; 0: predict none."""
    tokens: float = 0.0
    """Tokens that it is trained on, such as 2.5e9."""
    chip: str = "h100"
    """Kind of chip that it is trained on, by the names of `gptjax plan`."""
    mfu: float = 0.4
    """Share of the chip's peak that its training reaches."""
    price: float = 0.0
    """Price of an hour of one chip, in any currency; 0: unknown."""
    out: str = ""
    """HTML file to write the chart to; empty: scaling_fit.html in this folder."""

    def __post_init__(self):
        if not self.runs:
            raise UserError("no run is named; give run directories, or the folder of a sweep")
        usable_paths("", self, "runs", "out")
        page_file(self, "out")
        not_negative("", self, "seed")
        positive("", self, "bootstrap")
        if (self.params > 0) != (self.tokens > 0) or min(self.params, self.tokens) < 0:
            raise UserError(f"params={self.params:g} and tokens={self.tokens:g}: give both, above 0, or none")
        for name in ("chip", "mfu", "price"):
            no_effect("", self, name, self.params > 0, "params and tokens")
        if self.chip not in CHIP_NAMES:
            raise UserError(
                f"chip={self.chip!r} must be one of {', '.join(CHIP_NAMES)}.{did_you_mean(self.chip, CHIP_NAMES)}"
            )
        if not 0 < self.mfu <= 1:
            raise UserError(f"mfu={self.mfu} must lie in (0, 1]")
        if not 0 <= self.price < float("inf"):
            raise UserError(f"price={self.price} must not be negative")
