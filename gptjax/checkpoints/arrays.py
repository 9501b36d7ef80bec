"""Writes and reads trees of arrays as items of a folder. The only file that uses Orbax."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from gptjax.checkpoints.background import call_at_low_priority
from gptjax.checkpoints.direct import write_direct
from gptjax.errors import UserError
from gptjax.parallel import cluster


def checkpointer(for_all: bool = True, at_once: int = 0) -> ocp.AsyncCheckpointer:
    """Returns a checkpointer for all processes of a run, or for this one alone if not `for_all`.

    It reads at most `at_once` bytes at a time; 0: no limit.
    """
    for name in ("absl", "asyncio"):  # errors are reported by our own messages
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = ocp.options.MultiprocessingOptions()
    if not for_all and jax.process_count() > 1:
        own = jax.process_index()
        options = ocp.options.MultiprocessingOptions(own, {own}, f"process_{own}")
    # Compression hardly shrinks floats, and takes more CPU time than writing them.
    settings: dict[str, Any] = {"use_compression": False, "multiprocessing_options": options}
    settings["restore_concurrent_gb"] = 1.001 * at_once / 1e9 if at_once else None  # fractions are accepted
    if jax.default_backend() == "cpu":  # training needs the cores at the same time
        settings["use_ocdbt"] = False
        settings["type_handler_registry"] = type_handlers.create_type_handler_registry((jax.Array, _DirectHandler()))
    params, ema, rest = (ocp.PyTreeCheckpointHandler(**settings) for _ in range(3))
    composite_options = ocp.CompositeOptions(multiprocessing_options=options)
    composite = ocp.CompositeCheckpointHandler(composite_options=composite_options, params=params, ema=ema, rest=rest)
    return ocp.AsyncCheckpointer(composite, multiprocessing_options=options)


def start_saving(writer: ocp.AsyncCheckpointer, folder: Path, items: dict[str, Any]) -> None:
    """Starts threads with lower priority than the caller that write items into `folder`."""
    saved = {name: ocp.args.PyTreeSave(jax.tree.map(jnp.asarray, item)) for name, item in items.items()}
    args = ocp.args.Composite(**saved)
    call_at_low_priority(writer.save, folder, args=args)


def restore(reader: ocp.AsyncCheckpointer, folder: Path, items: dict[str, Any]) -> dict[str, Any]:
    """Loads items with the given shapes, dtypes and shardings.

    Raises:
        UserError: The arrays in the folder differ from the given shapes.
    """
    args = {
        name: ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        for name, item in items.items()
    }
    try:
        return dict(reader.restore(folder, args=ocp.args.Composite(**args)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: its arrays do not match the run's config: {reason}") from None


class _DirectHandler(type_handlers.ArrayHandler):
    """Writes zarr arrays (version 2) with one chunk for each shard, bypassing the page cache; reads as Orbax does.

    The arrays must not change before they are written.
    """

    def __init__(self) -> None:
        super().__init__(enable_write_sharding_file=False)

    async def serialize(
        self,
        values: Sequence[jax.Array],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> Sequence[Future]:
        """Starts a thread that writes this process's shards."""
        return [CommitFutureAwaitingContractedSignals(_write_arrays(values, infos), name="write_arrays")]


async def _write_arrays(values: Sequence[jax.Array], infos: Sequence[type_handlers.ParamInfo]) -> None:
    for value, info in zip(values, infos, strict=True):
        await info.await_path_creation()
        folder = Path(str(info.parent_dir)) / info.name
        folder.mkdir(exist_ok=True)
        chunk_shape = value.sharding.shard_shape(value.shape)
        if cluster.is_first():
            (folder / ".zarray").write_text(json.dumps(_zarr_metadata(value, chunk_shape)), encoding="utf-8")
        for shard in value.addressable_shards:
            if shard.replica_id == 0:
                starts = (part.start or 0 for part in shard.index)
                chunk = [str(start // size) for start, size in zip(starts, chunk_shape, strict=True)]
                write_direct(folder / (".".join(chunk) or "0"), np.asarray(shard.data))


def _zarr_metadata(value: jax.Array, chunk_shape: tuple[int, ...]) -> dict[str, Any]:
    """Content of the file .zarray (zarr.readthedocs.io, storage specification, version 2)."""
    dtype = np.dtype(value.dtype)
    return {
        "zarr_format": 2,
        "shape": value.shape,
        "chunks": chunk_shape,
        "dtype": dtype.name if dtype.kind == "V" else dtype.str,  # TensorStore identifies bfloat16 by name
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
    }
