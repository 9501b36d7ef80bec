"""Prints the tests that a pytest run skipped, one argument for pytest a line: skipped.py REPORT.xml, a JUnit report of
the family xunit1, which names files. A file that was skipped as a whole is one line."""

import sys
from xml.etree import ElementTree


def main(report: str) -> None:
    """Prints the skipped tests of a report."""
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            file, name = case.get("file", ""), case.get("name", "")
            module = file.removesuffix(".py").replace("/", ".")
            print(file if name == module else f"{file}::{name}")


if __name__ == "__main__":
    main(sys.argv[1])
