"""What is written when a run stops because step after step made no update."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.files import write_atomic
from gptjax.parallel import cluster
from gptjax.parallel.mesh import replicated
from gptjax.parallel.place import put
from gptjax.report.metrics import plain
from gptjax.training.setup import Parts
from gptjax.training.step import TrainState, make_gradient_norms

DUMP_FILE = "diverged.json"


def write_dump(parts: Parts, state: TrainState, batch: Any, skips: list[dict]) -> Path:
    """Writes the steps that made no update and, of the last one, the gradient's norm by layer; returns the file.

    Args:
        parts: Of the run.
        state: After the skips; its parameters are still those that all of them saw.
        batch: Of the last skip, on the devices.
        skips: Step, reason, loss, gradient norm and documents of each, the last one last.
    """
    step = put(np.int32(skips[-1]["step"] - 1), replicated(parts.mesh))
    norms = make_gradient_norms(parts.config, parts.mesh)(dataclasses.replace(state, step=step), batch)
    dump = {"skips": skips, "gradient_norms": norms}
    path = parts.run_dir / DUMP_FILE
    if cluster.is_first():
        write_atomic(path, json.dumps(plain(dump), allow_nan=False, indent=1).encode())
    return path
