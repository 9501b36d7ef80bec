"""`gptjax report`."""

from pathlib import Path

from gptjax.config.verbs.report import ReportConfig
from gptjax.errors import UserError
from gptjax.report.figures import save_figures
from gptjax.report.html import REPORT_FILE, write_report
from gptjax.report.record import names_of, read_record

COMPARISON_FILE = "comparison.html"


def run_report(options: ReportConfig) -> int:
    """Writes the report of a run to its folder, or of several runs to the current folder; prints the path.

    Raises:
        UserError: A path is no run directory, or a file cannot be written.
    """
    places = [Path(place).expanduser() for place in options.runs]
    records = [read_record(place, name) for place, name in zip(places, names_of(places), strict=True)]
    default = places[0] / REPORT_FILE if len(places) == 1 else Path(COMPARISON_FILE)
    path = Path(options.out).expanduser() if options.out else default
    if path.is_dir():
        raise UserError(f"out={path}: is a folder; name a file, such as {path / REPORT_FILE}")
    write_report(records, path)
    print(path)
    if options.png:
        for figure in save_figures(records, Path(options.png).expanduser()):
            print(figure)
    return 0
