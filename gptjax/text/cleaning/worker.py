"""A process that cleans parts: `python -m gptjax.text.cleaning.worker`.

It reads one line of JSON with the options, then one line for each part, and answers each with one line. It is a new
process and not a fork, because the parent can have threads of JAX, and importing its main module again could have side
effects.
"""

import json
import os
import sys

from gptjax.errors import UserError
from gptjax.text.cleaning.pool import clean_task


def main() -> None:
    """Cleans parts until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of the user's filter must not mix with the answers
    options = sys.stdin.readline()
    for line in sys.stdin:
        try:
            clean_task(options, *json.loads(line))
            answer = {}
        except UserError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"{error.filename or 'the system'}: {error.strerror or error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
