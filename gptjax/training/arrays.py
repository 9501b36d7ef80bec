"""Trees of arrays on the disk, in items of a folder: the only file that knows Orbax."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax.errors import UserError
from gptjax.training.background import started_from_below


def checkpointer(for_all: bool = True, at_once: int = 0) -> ocp.AsyncCheckpointer:
    """Reads and writes together with all processes of a run, or by itself; reads `at_once` bytes at a time, 0: any."""
    for name in ("absl", "asyncio"):  # what goes wrong is told in our own words
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = ocp.options.MultiprocessingOptions()
    if not for_all and jax.process_count() > 1:
        own = jax.process_index()
        options = ocp.options.MultiprocessingOptions(own, {own}, f"process_{own}")
    # Floats hardly get smaller, and compressing them takes more of the CPU than writing them.
    limit: Any = 1.001 * at_once / 1e9 if at_once else None  # GB; fractions work too
    params, ema, rest = (
        ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options, restore_concurrent_gb=limit)
        for _ in range(3)
    )
    together = ocp.CompositeOptions(multiprocessing_options=options)
    composite = ocp.CompositeCheckpointHandler(composite_options=together, params=params, ema=ema, rest=rest)
    return ocp.AsyncCheckpointer(composite, multiprocessing_options=options)


def start_saving(writer: ocp.AsyncCheckpointer, folder: Path, items: dict[str, Any]) -> None:
    """Starts threads that write items as `folder`; they give way to the caller's."""
    args = ocp.args.Composite(**{name: ocp.args.PyTreeSave(item) for name, item in items.items()})
    started_from_below(writer.save, folder, args=args)


def restore(reader: ocp.AsyncCheckpointer, folder: Path, items: dict[str, Any]) -> dict[str, Any]:
    """Loads items into the shapes, dtypes and shardings that are given.

    Raises:
        UserError: The folder holds other arrays.
    """
    args = {
        name: ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        for name, item in items.items()
    }
    try:
        return dict(reader.restore(folder, args=ocp.args.Composite(**args)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: holds other arrays than the run's config describes: {reason}") from None
