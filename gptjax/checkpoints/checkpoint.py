"""The checkpoints of a run directory.

A checkpoint has the items `params`, `ema` (if the run averages parameters) and `rest` (all other fields of the train
state). Sampling and `init_from` read one of the first two. The manifest is written last. It contains the checksums of
all files, and metadata: the state of the training loop and the data's hash.
"""

import dataclasses
import errno
import functools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from gptjax.checkpoints.arrays import checkpointer, restore, start_saving
from gptjax.checkpoints.background import lower_priority
from gptjax.checkpoints.choice import NAME, REJECTED, UNFINISHED, Choice, best_first, choose, list_entries, step_folder
from gptjax.checkpoints.manifest import (
    MANIFEST,
    DamagedError,
    Manifest,
    add_evaluation,
    check_sizes,
    read_manifest,
    write_manifest,
)
from gptjax.errors import UserError
from gptjax.files import publish
from gptjax.parallel import cluster

State = TypeVar("State")  # training.step.TrainState, which comes later in the order of imports
FOLDER = "checkpoints"
OVERHEAD = 2**20  # bytes that a checkpoint takes besides its arrays
DELETED = ".deleted-"  # prefix of a checkpoint that is being deleted


class Checkpoints:
    """Writes the checkpoints of a run; keeps the newest few and the best.

    A thread completes each save: Orbax writes the arrays, then the manifest acknowledges the checkpoint, then older
    checkpoints are deleted. A save that fails is reported in one line and changes no older checkpoint. Only one run at
    a time may use the folder (`guard.locked`).

    With several processes, each writes its own arrays into the same folder, and process 0 does everything else. A
    failure while arrays are written ends the process, because the others wait for it.
    """

    def __init__(self, run_dir: Path, keep: int = 1, notify: Callable[[str], None] = print, best_by: str = "loss"):
        self.folder = (run_dir / FOLDER).absolute()
        self.acknowledged: int | None = None
        """The newest step that this object has saved completely."""
        self.problem = ""
        """Why the last save failed; empty: it did not fail."""
        self._keep, self._notify, self._best_by = keep, notify, best_by
        self._checkpointer = checkpointer()
        self._copy: dict[str, Any] | None = None
        self._finishing: tuple[threading.Thread, Path] | None = None
        self._error: BaseException | None = None
        self._committed = False

    def newest(self, strict: bool) -> Choice:
        """Finds the newest checkpoint that verifies, without changing the disk. Process 0 searches for all processes.

        Raises:
            UserError: There are checkpoints but none verifies; or, if `strict`, one does not.
        """
        with cluster.all_or_none():
            choice = self._choose(strict) if cluster.is_first() else Choice(None, None, ())
        chosen = cluster.gather("" if choice.folder is None else choice.folder.name)[0]
        with cluster.all_or_none():
            if chosen and not cluster.is_first():
                choice = self._chosen(self.folder / chosen)
        return choice

    def _chosen(self, folder: Path) -> Choice:
        """Returns the choice that process 0 made."""
        try:
            return Choice(folder, read_manifest(folder), ())
        except DamagedError as error:
            raise UserError(f"{folder}: {error}; process 0 has read it there: is the folder shared?") from None

    def _choose(self, strict: bool) -> Choice:
        choice = choose(self.folder, "latest", strict, self._notify)
        if choice.folder is None and not _none_was_acknowledged(choice.rejected):
            raise UserError(
                f"{self.folder}: none of its {len(choice.rejected)} checkpoints verifies, so the run cannot resume;"
                " give another run_dir to start again"
            )
        return choice

    def set_aside_damaged(self, choice: Choice) -> None:
        """Renames the damaged checkpoints that `newest` rejected, so that their steps can be saved again, and deletes
        the remains of interrupted saves. Only process 0 calls it.
        """
        for path in self.folder.glob("[!.]*"):
            if UNFINISHED in path.name and NAME.fullmatch(path.name.partition(UNFINISHED)[0]):
                self._notify(f"{path}: removed the remains of an interrupted save")
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f"{DELETED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in choice.rejected:
            if NAME.fullmatch(path.name):
                aside = _free_name(path)
                publish(path, aside)
                self._notify(f"{path.name}: set aside as {aside.name}")

    def add_evaluation(self, step: int, val_loss: float, meta: dict) -> None:
        """Adds an evaluation to a checkpoint that was saved without one. Process 0 writes it."""
        if cluster.is_first():
            add_evaluation(step_folder(self.folder, step), val_loss, meta)

    def restore(self, step: int, abstract: State) -> State:
        """Loads a step with the shapes, dtypes and shardings of `abstract`; frozen parameters are those of `abstract`.

        Raises:
            UserError: The arrays do not match `abstract`.
        """
        items = _items(abstract)
        loaded = restore(self._checkpointer, step_folder(self.folder, step), items)
        state: Any = abstract
        return dataclasses.replace(state, params=loaded["params"], ema=loaded.get("ema"), **loaded["rest"])

    def save(self, state: Any, meta: dict, val_loss: float | None) -> None:
        """Starts writing `state`; returns as soon as `state` may be changed. See `save_items`."""
        items = _items(state)
        if jax.default_backend() == "cpu":
            # A copy is written: the next step is donated the state's buffers, and would wait until Orbax has written
            # them. Each save reuses the copy's memory, because allocating new pages takes longer than copying.
            self.wait()
            copied = jax.tree.map(jnp.copy, items) if self._copy is None else _copy_into(self._copy, items)
            items = self._copy = copied
        self.save_items(int(state.step), items, meta, val_loss)

    def save_items(self, step: int, items: dict[str, Any], meta: dict, val_loss: float | None) -> None:
        """Waits for the previous save, then starts writing trees of arrays as checkpoint `step`.

        Errors such as a full disk are reported and stored in `problem`; they are not raised.

        Raises:
            FileExistsError: There is already a checkpoint of this step.
        """
        self.wait()
        folder = step_folder(self.folder, step)
        if folder.exists():
            raise FileExistsError(f"{folder} exists already; a checkpoint is never overwritten")
        self.problem = ""
        obstacle = self._obstacle(items)
        obstacles = [text for text in cluster.gather(str(obstacle or "")) if text]
        if obstacles:
            self._failed(folder, obstacle or OSError(obstacles[0]))
            return
        try:
            start_saving(self._checkpointer, folder, items)
        except (OSError, ValueError) as error:
            self._failed(folder, error, shared=False)
            return
        thread = threading.Thread(target=self._finish, args=(folder, step, val_loss, meta), name="save")
        self._finishing = (thread, folder)
        thread.start()

    def wait(self) -> None:
        """Returns when the save in progress is on the disk or has failed."""
        if self._finishing is None:
            return
        thread, folder = self._finishing
        thread.join()
        error, self._error, self._finishing = self._error, None, None
        if isinstance(error, (OSError, ValueError)):
            self._failed(folder, error, shared=self._committed)
        elif error is not None:
            raise error

    def close(self) -> None:
        """Finishes all writing."""
        self.wait()
        self._checkpointer.close()

    def _finish(self, folder: Path, step: int, val_loss: float | None, meta: dict) -> None:
        self._committed = False
        lower_priority()
        try:
            self._checkpointer.wait_until_finished()
            self._committed = True
            if not cluster.is_first():
                return
            write_manifest(folder, step, val_loss, meta)
            self.acknowledged = step
            try:
                self._prune()
            except OSError as error:
                self._notify(f"{self.folder}: an older checkpoint could not be removed: {error}")
        except BaseException as error:  # `wait` raises it in the thread that asked for the save
            self._error = error

    def _obstacle(self, items: dict[str, Any]) -> OSError | None:
        """Checks for free disk space before a save. A disk that fills up during a save is handled too, but then Orbax
        prints many lines.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < sum(leaf.nbytes for leaf in jax.tree.leaves(items)) + OVERHEAD:
                return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            return error
        return None

    def _failed(self, folder: Path, error: Exception, shared: bool = True) -> None:
        """Reports a failed save, frees its disk space, and makes the next save possible.

        Raises:
            UserError: The other processes do not know of the failure (`shared` is false).
        """
        free = shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent).free
        reason = " ".join(str(error).split())[:200]
        full = (
            "no space left" in reason.lower()
            or "RESOURCE_EXHAUSTED" in reason
            or getattr(error, "errno", 0) == errno.ENOSPC
        )
        reason = "the disk is full" if full else reason
        self.problem = f"{folder}: not saved: {reason}; {free:,} bytes are free there, older checkpoints are intact"
        if not shared and jax.process_count() > 1:
            raise UserError(self.problem)
        self._notify(self.problem)
        if not cluster.is_first():
            return
        for path in self.folder.glob(f"{folder.name}{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        if not (folder / MANIFEST).exists():  # committed by Orbax, but never acknowledged
            shutil.rmtree(folder, ignore_errors=True)
        self._checkpointer = checkpointer()

    def _prune(self) -> None:
        """Deletes checkpoints that are neither among the newest nor the best. Unreadable ones stay."""
        readable: dict[Path, Manifest] = {}
        for path in list_entries(self.folder):
            try:
                manifest = read_manifest(path)
                check_sizes(path, manifest)
            except (DamagedError, UserError):
                continue
            readable[path] = manifest
        newest = sorted(readable, key=lambda path: readable[path].step)[-self._keep :]
        best = best_first(readable, self._best_by)[:1]
        for path in readable:
            if path not in [*newest, *best]:
                renamed = path.with_name(f"{DELETED}{path.name}")
                os.replace(path, renamed)
                shutil.rmtree(renamed)


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copy_into(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Copies `new` into the memory of `old`."""
    return jax.tree.map(jnp.copy, new)


def _none_was_acknowledged(rejected: tuple[Path, ...]) -> bool:
    """Whether no checkpoint was ever acknowledged: there is at most one folder, of a run killed in its first save."""
    checkpoints = [path for path in rejected if NAME.fullmatch(path.name)]
    return not checkpoints or (len(checkpoints) == 1 and _never_finished(checkpoints[0]))


def _never_finished(path: Path) -> bool:
    return path.is_dir() and not (path / MANIFEST).exists()


def _free_name(path: Path) -> Path:
    """An unused name for a checkpoint that is set aside."""
    aside, number = path.with_name(f"{path.name}{REJECTED}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{REJECTED}.{number}")
    return aside


def _items(state: Any) -> dict[str, Any]:
    """The arrays of a state (or their shapes), by item. Frozen parameters are left out; the base run has them."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "frozen"}
    items: dict[str, Any] = {"params": fields.pop("params"), "ema": fields.pop("ema"), "rest": fields}
    if fields["noise"] is None:  # checkpoints of runs without it have no such field
        del fields["noise"]
    return {name: item for name, item in items.items() if item is not None}
