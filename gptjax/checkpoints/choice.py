"""Which checkpoint of a folder is used: the newest or the best one that verifies. Nothing here deletes or renames."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from gptjax.checkpoints.manifest import DamagedError, Manifest, read_manifest, verify
from gptjax.errors import UserError

NAME = re.compile(r"\d{8,}")
REJECTED = ".rejected"  # what stands in the name of a checkpoint that was set aside
UNFINISHED = ".orbax-checkpoint-tmp"  # what stands in the name of a checkpoint while it is written


@dataclasses.dataclass(frozen=True)
class Choice:
    """A checkpoint that verifies, if there is one, and those that were passed over before it was found."""

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
    """Looks for the newest checkpoint, or the best one, that verifies.

    Args:
        folder: Holds the checkpoints of a run; it need not exist.
        which: best: see `best_first`; the newest where none was measured.
        strict: Refuse instead of passing over one.
        notify: Told in one line each what was rejected, and why.
        best_by: As `train.best_by`.

    Raises:
        UserError: `strict`, and one was rejected; or a newer gptjax wrote one.
    """
    rejected: list[Path] = []

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
        return Choice(path, manifest, tuple(rejected))
    return Choice(None, None, tuple(rejected))


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{step:08}"


def entries(folder: Path) -> list[Path]:
    """What lies in a checkpoint folder, finished checkpoints and strangers: neither hidden nor set aside."""
    if not folder.is_dir():
        return []
    names = sorted(folder.iterdir())
    return [p for p in names if not (p.name.startswith(".") or REJECTED in p.name or UNFINISHED in p.name)]


def best_first(manifests: dict[Path, Manifest], best_by: str) -> list[Path]:
    """Sorts measured checkpoints, the best first: by the score, then by validation loss, then the older one.

    Only measurements on the same data can be compared. So checkpoints that were measured as the newest of them was
    come before all others.
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
    """The lower the better; empty: the checkpoint has no such score."""
    if manifest.val_loss is None:
        return ()
    if best_by == "loss":
        return (manifest.val_loss,)
    score = manifest.scores.get(best_by)
    return () if score is None else (-score, manifest.val_loss)


def _candidates(folder: Path, which: str, best_by: str, reject: Callable[[Path, object], None]) -> Iterator[Path]:
    """Checkpoints in the order in which they are wanted."""
    steps = {}
    for path in entries(folder):
        if NAME.fullmatch(path.name):
            steps[int(path.name)] = path
        else:
            reject(path, "is not named as a checkpoint is")
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
