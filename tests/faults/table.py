"""The table of faults in docs/experiments/faults.md, made from test reports."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from gptjax.files import write_atomic

BEGIN, END = "<!-- faults: begin, written by make faults -->", "<!-- faults: end -->"
HEADER = ("| # | fault | what must happen | what was seen | as expected |", "|---|---|---|---|---|")
YES = "yes"
NUMBERS = range(1, 49)


@dataclasses.dataclass
class Row:
    """One fault and all that its tests saw."""

    number: int
    fault: str
    expected: str
    seen: list[str] = dataclasses.field(default_factory=list)
    outcomes: set[str] = dataclasses.field(default_factory=set)

    @property
    def result(self) -> str:
        if not self.outcomes <= {"passed", "skipped"}:
            return "NO"
        return YES if "passed" in self.outcomes else "not run"

    def __str__(self) -> str:
        cells = (str(self.number), self.fault, self.expected, "; ".join(dict.fromkeys(self.seen)), self.result)
        return f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |"


def collect(reports: Iterable) -> list[Row]:
    """One row for each fault that the reports name, in order of number; tests of the same fault share it."""
    rows: dict[tuple, Row] = {}
    for report in sorted(reports, key=lambda report: report.nodeid):
        texts = [value for name, value in report.user_properties if name == "seen"]
        for fault in (tuple(value) for name, value in report.user_properties if name == "fault"):
            row = rows.setdefault(fault, Row(*fault))
            row.seen += texts
            row.outcomes.add(report.outcome)
    return sorted(rows.values(), key=lambda row: row.number)


def write_table(path: Path, rows: list[Row]) -> list[str]:
    """Puts the rows between the marker lines of `path`; returns them as lines, and how many faults were as expected."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: needs the lines {BEGIN!r} and {END!r}")
    lines = [str(row) for row in rows]
    write_atomic(path, "\n".join([before + BEGIN, *HEADER, *lines, END + after]).encode())
    good, numbers = sum(row.result == YES for row in rows), {row.number for row in rows}
    missing = ", ".join(str(number) for number in NUMBERS if number not in numbers)
    last = f"{len(numbers)} faults, {good} of {len(rows)} rows as expected"
    return [*HEADER, *lines, last + (f"; no row for {missing}" if missing else "")]
