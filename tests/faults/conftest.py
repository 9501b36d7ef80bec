"""Faults that are injected for real, and the table of what was seen.

A test names its fault, injects it, and says what it saw:

    @pytest.mark.fault(9, "an array file is cut short", "rejected by name; the newest good checkpoint is used")
    def test_a_file_that_is_cut_short(seen):
        ...
        seen("00000004 rejected: params/d/1f has 100 bytes, must have 4,096; resumed from step 2")

`pytest tests/faults --fault-table FILE` writes a row for each fault between two marker lines of FILE, in order of
number, and prints the rows.
"""

from pathlib import Path

import pytest

from tests.faults.table import collect, write_table


def pytest_addoption(parser):
    parser.addoption("--fault-table", metavar="FILE", help="write what was seen into the table of FILE")


@pytest.fixture
def seen(record_property):
    """`seen(text)` notes what was observed, on one line; a test may call it several times."""
    return lambda text: record_property("seen", " ".join(str(text).split()))


def pytest_runtest_setup(item):
    for mark in item.iter_markers("fault"):
        number, fault, expected = mark.args
        item.user_properties.append(("fault", (number, fault, expected)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    names = [name for name, _ in item.user_properties]
    if report.when == "call" and report.passed and "fault" in names and "seen" not in names:
        report.outcome, report.longrepr = "failed", "a test of a fault must say what it saw: seen('...')"
    return report


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--fault-table", default=None)
    if path is None:
        return
    reports = [report for outcome in ("passed", "failed", "error", "skipped") for report in
               terminalreporter.stats.get(outcome, [])]  # fmt: skip
    lines = write_table(Path(path), collect(reports))
    terminalreporter.section("faults")
    for line in lines:
        terminalreporter.write_line(line)
