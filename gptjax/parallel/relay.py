"""A small program between a process's standard error and the terminal: `relay.py LOST_LINE LATE_LINE`.

The coordination service of jaxlib ends a process with abort() when another one is lost, or does not come, and prints a
page of its own log; there is no public hook. Whoever reads standard error shall find one line in its place. All else is
passed on as it comes. Started as a file, so that it imports nothing but the standard library.
"""

import os
import sys

ABORTED = b"Terminating process because the JAX distributed service detected fatal errors"
NOISE = (b"coordination_service", b"] Polled an error from", b"The tasks have crashed. Check the task logs")
LIST = b"The following tasks are unhealthy"
"""Begins a message of several lines: each that follows is the number of a task, until one that is noise."""


def main(lost: bytes, late: bytes) -> None:
    """Copies standard input to standard error, line by line, until the service has ended the process."""
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
