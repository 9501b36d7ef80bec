"""The report of a run that stopped because too many consecutive steps made no update."""

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
from gptjax.training.parts import Parts
from gptjax.training.step import TrainState, make_gradient_norms

DUMP_FILE = "diverged.json"


def write_dump(parts: Parts, state: TrainState, batch: Any, skips: list[dict]) -> Path:
    """Writes the steps without an update, and the gradient norm of each layer in the last one; returns the file.

    Args:
        parts: Parts of the run.
        state: State after the skips, whose parameters are those of the skipped steps.
        batch: Batch of the last skip, on the devices.
        skips: Step, reason, loss, gradient norm and documents of each skip, the last one last.
    """
    step = put(np.int32(skips[-1]["step"] - 1), replicated(parts.mesh))
    norms = make_gradient_norms(parts.config, parts.mesh)(dataclasses.replace(state, step=step), batch)
    dump = {"skips": skips, "gradient_norms": norms}
    path = parts.run_dir / DUMP_FILE
    if cluster.is_first():
        write_atomic(path, json.dumps(plain(dump), allow_nan=False, indent=1).encode())
    return path
