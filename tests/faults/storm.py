"""A server that forks trainers: the libraries are imported once, so that each start takes a fraction of a second.

Each line of standard input is a config file. A child trains it, with its output in the file's .log; the answer is the
child's process id and, when it has ended, its status, a line each.
"""

import os
import sys
import traceback

import jax

from gptjax.cli import main
from gptjax.machine import compile_cache
from gptjax.training import trainer  # noqa: F401 (imported before the fork)


def fork(path: str) -> int:
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(path.replace(".yaml", ".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = main(["train", path])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    compile_cache.start(sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compile_cache.start = lambda folder: None  # pyright: ignore: children keep these settings
    for line in sys.stdin:
        child = fork(line.strip())
        answer(child)
        _, status = os.waitpid(child, 0)
        answer(os.waitstatus_to_exitcode(status))
