"""`gptjax report`."""

from pathlib import Path

from gptjax.config.verbs.report import ReportConfig
from gptjax.errors import UserError, readable_values
from gptjax.files import check_writable
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
    named = ", ".join(options.runs)
    with readable_values(f"metrics.jsonl or events.jsonl of {named}"):
        records = [read_record(place, name) for place, name in zip(places, names_of(places), strict=True)]
    default = places[0] / REPORT_FILE if len(places) == 1 else Path(COMPARISON_FILE)
    path = Path(options.out).expanduser() if options.out else default
    check_writable("out", path)
    folder = Path(options.png).expanduser()
    if options.png and folder.exists() and not folder.is_dir():
        raise UserError(f"png={folder}: is a file; name a folder")
    with readable_values(f"metrics.jsonl or events.jsonl of {named}"):
        figures = save_figures(records, folder) if options.png else []
        write_report(records, path)
    for written in (path, *figures):
        print(written)
    return 0
