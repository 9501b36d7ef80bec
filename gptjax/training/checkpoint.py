"""Run directories and their checkpoints: the only file that knows Orbax.

A checkpoint has the items `params`, `ema` (where the run averages) and `rest` (the other fields of the train state).
Sampling and `init_from` read one of the first two. Its manifest, written last, has the checksums of all files and plain
values: the loop's own state, the data's hash. Beside the checkpoints lie `config.yaml` and `tokenizer.json`.

A run that trains only some parameters (`finetune.train`) saves those alone. The others are read from the run that it
started from, which `base.json` identifies.
"""

import dataclasses
import errno
import functools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import xxhash

from gptjax.config import Config
from gptjax.config_io import load_config, to_yaml
from gptjax.errors import UserError
from gptjax.files import publish, write_atomic
from gptjax.parallel import cluster
from gptjax.text.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from gptjax.training.background import give_way, started_from_below
from gptjax.training.choice import NAME, REJECTED, UNFINISHED, Choice, choose, entries, step_folder
from gptjax.training.finetune import join, without_heads
from gptjax.training.manifest import MANIFEST, DamagedError, Manifest, check_sizes, read_manifest, write_manifest
from gptjax.training.step import TrainState, init_state

CONFIG_FILE, TOKENIZER_FILE, BASE_FILE, FOLDER = "config.yaml", "tokenizer.json", "base.json", "checkpoints"
ROOM = 2**20  # bytes that a checkpoint takes beside its arrays
DELETED = ".deleted-"  # begins the name of a checkpoint that is on its way out


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model, ready to be used."""

    config: Config
    params: dict
    tokenizer: Tokenizer | None
    step: int


class Checkpoints:
    """The checkpoints that a run writes; keeps the newest few and the best.

    A save is finished on a thread: Orbax writes the arrays, then the manifest acknowledges them, then older checkpoints
    go. A save that fails is told in one line, and leaves what is older as it is. One run at a time, see `guard.locked`.

    Of several processes each writes the arrays that it has, into the same folder; process 0 does all else. There a save
    that fails while arrays are written ends the process, because the others wait for it.
    """

    def __init__(self, run_dir: Path, keep: int = 1, notify: Callable[[str], None] = print):
        self.folder = (run_dir / FOLDER).absolute()
        self.acknowledged: int | None = None
        """The newest step that this object has saved whole."""
        self.problem = ""
        """Why the last save failed."""
        self._keep, self._notify = keep, notify
        self._checkpointer = _checkpointer()
        self._copy: dict[str, Any] | None = None
        self._finishing: tuple[threading.Thread, Path] | None = None
        self._error: BaseException | None = None
        self._committed = False

    def resume(self, strict: bool) -> Choice:
        """Looks for the newest checkpoint that verifies, and puts what stands in its way aside, under another name.

        What a killed save left behind, and was never a checkpoint, is removed. Process 0 does it for all.

        Raises:
            UserError: There are checkpoints and none verifies; or, if `strict`, one does not.
        """
        with cluster.together():
            choice = self._choose(strict) if cluster.is_first() else Choice(None, None, ())
        chosen = cluster.gather("" if choice.folder is None else choice.folder.name)[0]
        with cluster.together():
            if chosen and not cluster.is_first():
                choice = self._chosen(self.folder / chosen)
        return choice

    def _chosen(self, folder: Path) -> Choice:
        """The choice that process 0 has made."""
        try:
            return Choice(folder, read_manifest(folder), ())
        except DamagedError as error:
            raise UserError(f"{folder}: {error}; process 0 has read it there: is the folder shared?") from None

    def _choose(self, strict: bool) -> Choice:
        for path in self.folder.glob("[!.]*"):
            if UNFINISHED in path.name and NAME.fullmatch(path.name.partition(UNFINISHED)[0]):
                self._notify(f"{path}: removed what an interrupted save left")
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f"{DELETED}*"):
            shutil.rmtree(path, ignore_errors=True)
        choice = choose(self.folder, "latest", strict, self._notify)
        if choice.folder is None and not _only_an_unfinished_first(choice.rejected):
            raise UserError(
                f"{self.folder}: none of its {len(choice.rejected)} checkpoints verifies, so the run cannot go on;"
                " give another run_dir to begin anew"
            )
        for path in choice.rejected:
            if NAME.fullmatch(path.name):
                aside = _free_name(path)
                publish(path, aside)
                self._notify(f"{path.name}: set aside as {aside.name}")
        return choice

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Loads a step into the shapes, dtypes and shardings of `abstract`; what is frozen is taken from there.

        Raises:
            UserError: Its arrays are not those of `abstract`.
        """
        items = _items(abstract)
        loaded = _restore(self._checkpointer, step_folder(self.folder, step), items)
        return TrainState(params=loaded["params"], ema=loaded.get("ema"), frozen=abstract.frozen, **loaded["rest"])

    def save(self, state: TrainState, meta: dict, val_loss: float | None) -> None:
        """Starts writing `state`; returns when it may be changed. See `save_items`."""
        items = _items(state)
        if jax.default_backend() == "cpu":
            # Orbax would hold the state's own buffers until they are written, and the next step, which takes them
            # over, would wait for it. The copy's memory is kept: fresh pages cost more than what is put into them.
            self.wait()
            copied = jax.tree.map(jnp.copy, items) if self._copy is None else _copy_into(self._copy, items)
            items = self._copy = copied
        self.save_items(int(state.step), items, meta, val_loss)

    def save_items(self, step: int, items: dict[str, Any], meta: dict, val_loss: float | None) -> None:
        """Starts writing trees of arrays as checkpoint `step`, after the save before it is finished.

        A full disk and the like are told, and found in `problem`; they raise nothing.

        Raises:
            FileExistsError: There is a checkpoint of this step already.
        """
        self.wait()
        folder = step_folder(self.folder, step)
        if folder.exists():
            raise FileExistsError(f"{folder} exists already; a checkpoint is never written over")
        args = ocp.args.Composite(**{name: ocp.args.PyTreeSave(item) for name, item in items.items()})
        self.problem = ""
        obstacle = self._obstacle(items)
        obstacles = [text for text in cluster.gather(str(obstacle or "")) if text]
        if obstacles:
            self._failed(folder, obstacle or OSError(obstacles[0]))
            return
        try:
            started_from_below(self._checkpointer.save, folder, args=args)
        except (OSError, ValueError) as error:
            self._failed(folder, error, shared=False)
            return
        thread = threading.Thread(target=self._finish, args=(folder, step, val_loss, meta), name="save")
        self._finishing = (thread, folder)
        thread.start()

    def wait(self) -> None:
        """Returns when all that was started is on the disk, or has failed."""
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
        give_way()
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
        """A disk that fills up half-way is survived too, but with much noise from the libraries below."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < sum(leaf.nbytes for leaf in jax.tree.leaves(items)) + ROOM:
                return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            return error
        return None

    def _failed(self, folder: Path, error: Exception, shared: bool = True) -> None:
        """Tells of a save that failed, frees what it took, and makes the next one possible.

        Raises:
            UserError: Other processes do not know of it (`shared` is false).
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
        self._checkpointer = _checkpointer()

    def _prune(self) -> None:
        """Removes checkpoints that are neither among the newest nor the best. What cannot be read stays."""
        readable: dict[Path, Manifest] = {}
        for path in entries(self.folder):
            try:
                manifest = read_manifest(path)
                check_sizes(path, manifest)
            except (DamagedError, UserError):
                continue
            readable[path] = manifest
        newest = sorted(readable, key=lambda path: readable[path].step)[-self._keep :]
        measured = [path for path in readable if readable[path].val_loss is not None]
        best = min(measured, key=lambda path: (readable[path].val_loss, readable[path].step), default=None)
        for path in readable:
            if path not in newest and path != best:
                going = path.with_name(f"{DELETED}{path.name}")
                os.replace(path, going)
                shutil.rmtree(going)


def write_description(
    run_dir: Path, config: Config, tokenizer: Tokenizer | None, base: LoadedRun | None = None
) -> None:
    """Writes `config.yaml`, `tokenizer.json` and, where parameters of `base` stay as they are, `base.json`.

    Raises:
        UserError: The run was started over another base.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if base is not None and config.finetune.train != "all":
        if (run_dir / BASE_FILE).is_file():
            _check_base(run_dir, base.params, config.init_from)
        else:
            content = {"init_from": config.init_from, "step": base.step, "fingerprint": fingerprint(base.params)}
            write_atomic(run_dir / BASE_FILE, json.dumps(content, indent=1).encode())
    write_atomic(run_dir / CONFIG_FILE, to_yaml(config).encode())
    if tokenizer is not None:
        save_tokenizer(tokenizer, run_dir / TOKENIZER_FILE)


def load_run(
    run_dir: Path,
    which: Literal["best", "latest"] = "best",
    strict: bool = False,
    notify: Callable[[str], None] = print,
    base_dir: str = "",
) -> LoadedRun:
    """Loads a run's parameters (averaged, where the run averages) on one device, its config and its tokenizer.

    Args:
        run_dir: The run; nothing in it is changed.
        which: The checkpoint with the lowest validation loss, or the newest.
        strict: Refuse, instead of taking another checkpoint, where one is damaged.
        notify: Told in one line what was rejected, and why.
        base_dir: Run to take parameters from that this one did not train; empty: the one that it started from.

    Raises:
        UserError: The folder is no run directory, or has no checkpoint that verifies and is finite, or the base is not
            the one trained over.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise UserError(f"{run_dir}: no run directory (it has no {CONFIG_FILE}); train one with gptjax train")
    config = load_config(run_dir / CONFIG_FILE)
    choice = choose(run_dir / FOLDER, which, strict, notify)
    if choice.folder is None or choice.manifest is None:
        number = len(choice.rejected)
        what = f"none of its {number} checkpoints verifies" if number else "has no checkpoint yet"
        raise UserError(f"{run_dir}: {what}")
    item = "ema" if config.train.ema else "params"
    abstract = _abstract_params(config)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    checkpointer = _checkpointer(for_all=False, at_once=largest)  # so that no second copy of all is held while reading
    try:
        params = _restore(checkpointer, choice.folder.absolute(), {item: abstract})[item]
    finally:
        checkpointer.close()
    check_finite(params, str(choice.folder))
    if config.finetune.train != "all":
        params = join(params, _frozen(run_dir, config, base_dir or config.init_from, strict, notify))
    elif base_dir:
        raise UserError(f"{run_dir}: trained all of its parameters and needs no base; leave out base={base_dir}")
    tokenizer_path = run_dir / TOKENIZER_FILE
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path.is_file() else None
    return LoadedRun(config, params, tokenizer, choice.manifest.step)


def load_state(run_dir: Path) -> tuple[TrainState, dict]:
    """Loads a run's newest state whole, on one device, and its plain values.

    Raises:
        UserError: The folder is no run directory, or its newest checkpoint does not verify.
    """
    config = load_config(run_dir / CONFIG_FILE)
    manifest = choose(run_dir / FOLDER, "latest", strict=True).manifest
    if manifest is None:
        raise UserError(f"{run_dir}: has no checkpoint yet")
    checkpoints = Checkpoints(run_dir)
    try:
        abstract = _on_one_device(jax.eval_shape(lambda: init_state(config)))
        if config.finetune.train != "all":
            frozen = _frozen(run_dir, config, config.init_from, strict=True, notify=print)
            abstract = dataclasses.replace(abstract, frozen=frozen)
        return checkpoints.restore(manifest.step, abstract), manifest.meta
    finally:
        checkpoints.close()


def write_run(run_dir: Path, config: Config, params: dict, tokenizer: Tokenizer | None) -> None:
    """Makes a run directory of parameters alone, as checkpoint 0: something to sample from and to start from.

    Raises:
        UserError: The folder holds a run already, or cannot be written.
    """
    if (run_dir / CONFIG_FILE).exists() or (run_dir / FOLDER).exists():
        raise UserError(f"{run_dir}: holds a run already; name another folder")
    write_description(run_dir, config, tokenizer)
    checkpoints = Checkpoints(run_dir, notify=lambda message: None)
    checkpoints.save_items(0, {"params": params}, {}, None)
    checkpoints.close()
    if checkpoints.problem:
        raise UserError(checkpoints.problem)


def check_finite(tree: Any, where: str) -> None:
    """Refuses arrays that hold NaN or infinity: nothing that is computed from them would be a number.

    Raises:
        UserError: The message names the first such leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    floats = [(path, leaf) for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    for (path, _), finite in zip(floats, jax.device_get(_all_finite([leaf for _, leaf in floats])), strict=True):
        if not finite:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"{where}: {name} holds NaN or infinity; take an older checkpoint, or train again")


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copy_into(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `new` in the memory of `old`."""
    return jax.tree.map(jnp.copy, new)


def _checkpointer(for_all: bool = True, at_once: int = 0) -> ocp.AsyncCheckpointer:
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


def _restore(checkpointer: ocp.AsyncCheckpointer, folder: Path, items: dict[str, Any]) -> dict[str, Any]:
    """Loads items into the shapes, dtypes and shardings that are given."""
    args = {
        name: ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        for name, item in items.items()
    }
    try:
        return dict(checkpointer.restore(folder, args=ocp.args.Composite(**args)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: holds other arrays than the run's config describes: {reason}") from None


def _only_an_unfinished_first(rejected: tuple[Path, ...]) -> bool:
    """Whether no checkpoint was ever acknowledged: at most one folder, from a run killed while it wrote its first."""
    checkpoints = [path for path in rejected if NAME.fullmatch(path.name)]
    return not checkpoints or (len(checkpoints) == 1 and _never_finished(checkpoints[0]))


def _never_finished(path: Path) -> bool:
    return path.is_dir() and not (path / MANIFEST).exists()


def _free_name(path: Path) -> Path:
    """A name for a checkpoint that is set aside."""
    aside, number = path.with_name(f"{path.name}{REJECTED}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{REJECTED}.{number}")
    return aside


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state (or their shapes), by item; those that stay as they are belong to the base."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "frozen"}
    items: dict[str, Any] = {"params": fields.pop("params"), "ema": fields.pop("ema"), "rest": fields}
    return {name: item for name, item in items.items() if item is not None}


def _abstract_params(config: Config) -> dict:
    """Shapes and dtypes of the parameters that a run trains, placed on one device."""
    return _on_one_device(jax.eval_shape(lambda: init_state(config).params))


def fingerprint(params: dict) -> str:
    """Identity of parameters, heads left out: 32 hexadecimal digits, the same for the same names and bits."""
    digest = xxhash.xxh3_128()
    leaves, _ = jax.tree_util.tree_flatten_with_path(without_heads(params))
    for path, leaf in leaves:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _frozen(run_dir: Path, config: Config, base_dir: str, strict: bool, notify: Callable[[str], None]) -> dict:
    """The parameters of its base that a run did not train, in the run's dtype."""
    base = load_run(Path(base_dir).expanduser(), strict=strict, notify=notify)
    _check_base(run_dir, base.params, base_dir)
    return jax.jit(lambda given: init_state(config, given).frozen)(without_heads(base.params))


def _check_base(run_dir: Path, params: dict, base_dir: str) -> None:
    expected = json.loads((run_dir / BASE_FILE).read_text())["fingerprint"]
    if fingerprint(params) != expected:
        raise UserError(
            f"{run_dir}: was trained over another base than {base_dir}: its parameters are not those that"
            f" {BASE_FILE} identifies ({expected[:8]}); give the right run as base, or train again"
        )


def _on_one_device(shapes: Any) -> Any:
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)
