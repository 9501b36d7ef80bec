"""Prints the tests that a pytest run skipped, one argument for pytest a line: skipped.py REPORT.xml, a JUnit report of
the family xunit1, which names files."""

import sys
from xml.etree import ElementTree


def main(report: str) -> None:
    """Prints the skipped tests of a report."""
    cases = [case for case in ElementTree.parse(report).iter("testcase") if case.find("skipped") is not None]
    print("\n".join(f"{case.get('file')}::{case.get('name')}" for case in cases))


if __name__ == "__main__":
    main(sys.argv[1])
