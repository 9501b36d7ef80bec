"""Options of report."""

import dataclasses

from gptjax.config.rules import usable_paths
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The runs that are shown and where the page goes."""

    runs: tuple[str, ...] = ()
    """Run directories; several are compared. The option's name may be left out."""
    out: str = ""
    """File to write; empty: report.html in the run directory, or comparison.html in this folder for several runs."""
    png: str = ""
    """Folder for the charts as PNG files."""

    def __post_init__(self):
        if not self.runs:
            raise UserError("no run is named; give the folder of one run, or of several to compare them")
        usable_paths("", self, "runs", "out", "png")
