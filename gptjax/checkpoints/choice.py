"""Chooses a checkpoint of a folder: the newest or the best one that verifies. Never deletes or renames."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from gptjax.checkpoints.manifest import DamagedError, Manifest, read_manifest, verify
from gptjax.errors import UserError

NAME = re.compile(r"\d{8,}")
REJECTED = ".rejected"  # part of the name of a checkpoint that was set aside
UNFINISHED = ".orbax-checkpoint-tmp"  # part of the name of a checkpoint while it is written


@dataclasses.dataclass(frozen=True)
class Choice:
    """A checkpoint that verifies (None: there is none), and the paths that were rejected before it."""

    folder: Path | None
    manifest: Manifest | None
    rejected: tuple[Path, ...]


def choose(
    folder: Path,
    which: Literal["best", "latest"],
    strict: bool,
    notify: Callable[[str], None] = print,
    best_by: str = "loss",
) -> Choice:
    """Finds the newest or the best checkpoint that verifies; arguments and errors as for `choose_many`."""
    return choose_many(folder, 1, which, strict, notify, best_by)[0]


def choose_many(
    folder: Path,
    count: int,
    which: Literal["best", "latest"],
    strict: bool,
    notify: Callable[[str], None] = print,
    best_by: str = "loss",
) -> list[Choice]:
    """Finds `count` checkpoints that verify, the newest or the best first; an empty choice ends a list of fewer.

    Args:
        folder: The checkpoints of a run; it need not exist.
        count: Number of checkpoints.
        which: "best": see `best_first`; the newest if none was evaluated.
        strict: Raise an error instead of using another checkpoint.
        notify: Called with one line for each rejected checkpoint, with the reason.
        best_by: As `train.best_by`.

    Raises:
        UserError: A checkpoint was rejected and `strict` is true; or a newer gptjax wrote one.
    """
    rejected: list[Path] = []
    found: list[Choice] = []

    def reject(path: Path, reason: object) -> None:
        if strict:
            raise UserError(f"{path}: {reason}; without the strict option an older checkpoint would be used")
        notify(f"{path}: rejected: {reason}")
        rejected.append(path)

    for path in _candidates(folder, which, best_by, reject):
        try:
            manifest = verify(path)
        except DamagedError as error:
            reject(path, error)
            continue
        if rejected:
            notify(f"using {path.name} instead")
        found.append(Choice(path, manifest, tuple(rejected)))
        if len(found) == count:
            return found
    return [*found, Choice(None, None, tuple(rejected))]


def step_folder(folder: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return folder / f"{step:08}"


def list_entries(folder: Path) -> list[Path]:
    """Lists checkpoints and foreign files of a folder, except those that are hidden, set aside or unfinished."""
    if not folder.is_dir():
        return []
    names = sorted(folder.iterdir())
    return [p for p in names if not (p.name.startswith(".") or REJECTED in p.name or UNFINISHED in p.name)]


def best_first(manifests: dict[Path, Manifest], best_by: str) -> list[Path]:
    """Sorts evaluated checkpoints, best first: by the score, then by validation loss, then the older one first.

    Only evaluations on the same data are comparable. So checkpoints that were evaluated on the same data as the newest
    one come before all others.
    """
    measured = [path for path, manifest in manifests.items() if _rank(manifest, best_by)]
    if not measured:
        return []
    newest = max((manifests[path] for path in measured), key=lambda manifest: manifest.step)
    current = {"", newest.measured_on}

    def key(path: Path) -> tuple:
        manifest = manifests[path]
        return manifest.measured_on not in current, _rank(manifest, best_by), manifest.step

    return sorted(measured, key=key)


def _rank(manifest: Manifest, best_by: str) -> tuple[float, ...]:
    """Sort key, lower is better; empty: the checkpoint has no such score."""
    if manifest.val_loss is None:
        return ()
    if best_by == "loss":
        return (manifest.val_loss,)
    score = manifest.scores.get(best_by)
    return () if score is None else (-score, manifest.val_loss)


def _candidates(folder: Path, which: str, best_by: str, reject: Callable[[Path, object], None]) -> Iterator[Path]:
    """Yields checkpoints in order of preference."""
    steps = {}
    for path in list_entries(folder):
        if NAME.fullmatch(path.name):
            steps[int(path.name)] = path
        else:
            reject(path, "its name is not that of a checkpoint")
    newest_first = [steps[step] for step in sorted(steps, reverse=True)]
    if which == "latest":
        yield from newest_first
        return
    manifests = {}
    for path in newest_first:
        try:
            manifests[path] = read_manifest(path)
        except DamagedError as error:
            reject(path, error)
    measured = best_first(manifests, best_by)
    yield from measured
    yield from (path for path in manifests if path not in measured)
