"""How long one waits: `python bench/start.py`; prints JSON, seconds by what is waited for.

help: `gptjax --help`. first_step: the demo's first training step, with data prepared and programs compiled by a run
before.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def seconds(*command: str, until: str = "") -> float:
    """Runs a command and returns when a line with `until` comes, or, where that is empty, when it ends."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if until and until in line:
                break
        taken = time.perf_counter() - started
        process.terminate() if until else process.wait()
    return taken


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:

        def demo(number: int) -> float:
            train = [sys.executable, "-u", "train.py", "configs/demo.yaml", "--run_dir", f"{folder}/{number}"]
            return seconds(*train, "--cache_dir", f"{folder}/cache", "--train.log_every", "1", until="step 1/")

        demo(0)
        print(json.dumps({"help": min(seconds(sys.executable, "-m", "gptjax", "--help") for _ in range(3)),
                          "first_step": min(demo(number) for number in (1, 2))}))  # fmt: skip


if __name__ == "__main__":
    main()
