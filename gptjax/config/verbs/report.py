"""Options of report."""

import dataclasses

from gptjax.config.rules import page_file, usable_paths
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Runs to show, and files to write."""

    runs: tuple[str, ...] = ()
    """Run directories; several runs are compared. The option's name may be omitted."""
    out: str = ""
    """HTML file to write; empty: report.html in the run directory, or for several runs comparison.html in the current
    folder."""
    png: str = ""
    """Folder to write the charts to as PNG files; empty: none."""

    def __post_init__(self):
        if not self.runs:
            raise UserError("no run is named; give the folder of one run, or of several to compare them")
        usable_paths("", self, "runs", "out", "png")
        page_file(self, "out")
