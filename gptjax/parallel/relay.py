"""A filter between a process's standard error and the terminal: `relay.py LOST_LINE LATE_LINE`.

When another process is lost or does not start, the coordination service of jaxlib prints a page of its log and calls
abort(); there is no public hook. This program replaces that page by one line and passes everything else on. It runs as
a separate file, so that it imports only the standard library.
"""

import os
import sys

ABORTED = b"Terminating process because the JAX distributed service detected fatal errors"
NOISE = (b"coordination_service", b"] Polled an error from", b"The tasks have crashed. Check the task logs")
LIST = b"The following tasks are unhealthy"
"""First line of a message of several lines. Each following line is the number of a task."""


def main(lost: bytes, late: bytes) -> None:
    """Copies standard input to standard error, line by line, until the service aborts the process."""
    told = listing = False
    for line in sys.stdin.buffer:
        if ABORTED in line:
            rest = line + sys.stdin.buffer.read()
            if not told:
                os.write(2, (late if b"/RegisterTask" in rest else lost) + b"\n")
            return
        told = told or line.startswith(lost)
        listing = LIST in line or (listing and line.strip().isdigit())
        if not listing and not any(word in line for word in NOISE):
            os.write(2, line)


if __name__ == "__main__":
    main(*(os.fsencode(word) for word in sys.argv[1:]))
