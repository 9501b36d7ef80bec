"""The table itself."""

import pytest

from tests.faults.table import BEGIN, END, collect, write_table


class Report:
    def __init__(self, nodeid, outcome, *properties):
        self.nodeid, self.outcome, self.user_properties = nodeid, outcome, list(properties)


def test_rows_come_in_order_and_join_what_was_seen(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nmore\n")
    reports = [
        Report("d", "failed", ("fault", (12, "second", "stops")), ("seen", "went on")),
        Report("a", "passed", ("fault", [3, "first", "goes on"]), ("seen", "a | b")),
        Report("b", "passed", ("fault", [3, "first", "goes on"]), ("seen", "c")),
        Report("c", "skipped", ("fault", (4, "other", "goes on"))),
    ]
    lines = write_table(path, collect(reports))
    assert lines[-1].startswith("3 faults, 1 of 3 rows as expected; no row for 1, 2, 5, 6, ")
    assert lines[-1].endswith(", 46, 47, 48")
    text = path.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n| #") and text.endswith(f"{END}\n\nmore\n") and "old" not in text
    assert [line for line in text.splitlines() if line.startswith(("| 3 ", "| 4 ", "| 12 "))] == [
        "| 3 | first | goes on | a ¦ b; c | yes |",
        "| 4 | other | goes on |  | not run |",
        "| 12 | second | stops | went on | NO |",
    ]


def test_a_page_without_markers_is_left_alone(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match="needs the lines"):
        write_table(path, [])
    assert path.read_text() == "nothing\n"
