"""A process that cleans parts: `python -m gptjax.text.cleaning.worker`.

It reads one line of JSON with the options, then one line for each part, and answers each with one line. It is a process
of its own, not a fork: the parent may hold the threads of JAX, and its main module may not be one to import twice.
"""

import json
import os
import sys
from pathlib import Path

from gptjax.config.data import DataConfig
from gptjax.config.reader import from_dict
from gptjax.errors import UserError
from gptjax.text.cleaning.part import clean_part
from gptjax.text.cleaning.stages import Stage, make_stages
from gptjax.text.formats import Document


def main() -> None:
    """Cleans parts until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a user's filter prints is no answer
    options = json.loads(sys.stdin.readline())
    made: tuple[DataConfig, list[Stage]] | None = None
    for line in sys.stdin:
        try:
            if made is None:
                data = from_dict(DataConfig, options, "data")
                made = data, make_stages(data)
            data, stages = made
            path, documents = json.loads(line)
            part = [Document(*document) for document in documents]
            clean_part(Path(path), part, stages, data.clean.near_duplicates > 0)
            answer = {}
        except UserError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"{error.filename or 'the system'}: {error.strerror or error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
