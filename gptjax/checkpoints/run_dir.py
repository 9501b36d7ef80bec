"""Loads models from run directories, which contain a config, a tokenizer and checkpoints.

A run that trains only some parameters (`finetune.train`) saves only those. The frozen parameters are loaded from the
run that it started from, its base, which `base.json` identifies.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from gptjax.checkpoints.arrays import checkpointer, restore
from gptjax.checkpoints.checkpoint import FOLDER, Checkpoints
from gptjax.checkpoints.choice import choose_many
from gptjax.config.reader import to_yaml
from gptjax.config.run import Config
from gptjax.config.start import CONFIG_FILE, load_run_config
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.tasks.trainable import init_split, join, without_heads
from gptjax.text.tokenizer import load_tokenizer, save_tokenizer
from gptjax.text.tokenizers.base import Tokenizer

TOKENIZER_FILE, BASE_FILE, CHAT_TEMPLATE_FILE = "tokenizer.json", "base.json", "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model with its config and tokenizer."""

    config: Config
    params: dict
    tokenizer: Tokenizer | None
    step: int
    val_loss: float | None = None
    """Validation loss of the checkpoint; None: not evaluated."""
    data_hash: str = ""
    """Identity of the data that it was trained on; empty: unknown."""
    chat_template: str = ""
    """Source of the Jinja template that an imported model writes chats in; empty: it came with none."""


def write_description(
    run_dir: Path, config: Config, tokenizer: Tokenizer | None, base: LoadedRun | None = None
) -> None:
    """Writes `config.yaml`, `tokenizer.json` and, if the run needs parameters of `base` to resume, `base.json`.

    Raises:
        UserError: The run was started from another base, or the folder has the tokenizer of another program.
    """
    if (run_dir / TOKENIZER_FILE).exists() and not (run_dir / CONFIG_FILE).exists():
        raise UserError(
            f"{run_dir}: has a {TOKENIZER_FILE} of another program, which a run replaces; name another folder"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    if base is not None and (config.finetune.train != "all" or config.finetune.mixout):
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
    average: int = 1,
) -> LoadedRun:
    """Loads a run's parameters (the averaged ones, if the run averages) onto one device, with config and tokenizer.

    Args:
        run_dir: The run; it is not changed.
        which: The best checkpoint by the run's `train.best_by`, or the newest.
        strict: Raise an error instead of using another checkpoint if one is damaged.
        notify: Called with one line for each checkpoint that was rejected.
        base_dir: Run with the frozen parameters; empty: the run that this one started from.
        average: Number of checkpoints whose parameters are averaged (arXiv:1706.03762, section 6.1).

    Raises:
        UserError: The folder is not a run directory, no checkpoint verifies, parameters are not finite, or the base
            differs from the one that was used in training.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        foreign = (run_dir / "config.json").is_file() or run_dir.suffix == ".gguf"
        advice = "convert it with gptjax import" if foreign else "train one with gptjax train"
        raise UserError(f"{run_dir}: no run directory (it has no {CONFIG_FILE}); {advice}")
    config = load_run_config(run_dir)
    choices = choose_many(run_dir / FOLDER, average, which, strict, notify, config.train.best_by)
    choice, folders = choices[0], [each.folder for each in choices if each.folder is not None]
    if choice.folder is None or choice.manifest is None:
        number = len(choice.rejected)
        what = f"none of its {number} checkpoints verifies" if number else "has no checkpoint yet"
        raise UserError(f"{run_dir}: {what}")
    if len(folders) < average:
        raise UserError(
            f"{run_dir}: average={average} needs as many checkpoints, {len(folders)} verify; train.save_every and"
            " train.keep_checkpoints decide how many there are"
        )
    item = "ema" if config.averages_params else "params"
    abstract = _abstract_params(config)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    reader = checkpointer(for_all=False, at_once=largest)  # reads leaf by leaf, without a second copy of all
    try:
        params = restore(reader, choice.folder.absolute(), {item: abstract})[item]
        for n, folder in enumerate(folders[1:], 2):
            params = _average(params, restore(reader, folder.absolute(), {item: abstract})[item], n)
    finally:
        reader.close()
    check_finite(params, str(choice.folder))
    if config.finetune.train != "all":
        params = join(params, frozen_params(run_dir, config, base_dir or config.init_from, strict, notify))
    elif base_dir:
        raise UserError(f"{run_dir}: trained all of its parameters and needs no base; leave out base={base_dir}")
    tokenizer_path = run_dir / TOKENIZER_FILE
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path.is_file() else None
    template_path = run_dir / CHAT_TEMPLATE_FILE
    chat_template = template_path.read_text(encoding="utf-8") if template_path.is_file() else ""
    manifest = choice.manifest
    data_hash = manifest.meta.get("data_hash", "")
    return LoadedRun(config, params, tokenizer, manifest.step, manifest.val_loss, data_hash, chat_template)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _average(mean: dict, params: dict, n: int) -> dict:
    """The mean of n sets of parameters, from that of n - 1 of them and the last one."""

    def one(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return a + (b - a) / n

    return jax.tree.map(lambda a, b: one(a, b).astype(a.dtype), mean, params)


def write_run(
    run_dir: Path, config: Config, params: dict, tokenizer: Tokenizer | None, base: LoadedRun | None = None
) -> None:
    """Creates a run directory with parameters as checkpoint 0, for sampling and as a starting point for training.

    With a `base`, whose parameters stay frozen, `params` are only those that the run adds to it.

    Raises:
        UserError: The folder already contains a run, or cannot be written.
    """
    if (run_dir / CONFIG_FILE).exists() or (run_dir / FOLDER).exists():
        raise UserError(f"{run_dir}: already contains a run; name another folder")
    write_description(run_dir, config, tokenizer, base)
    checkpoints = Checkpoints(run_dir, notify=lambda message: None)
    checkpoints.save_items(0, {"params": params}, {}, None)
    checkpoints.close()
    if checkpoints.problem:
        raise UserError(checkpoints.problem)


def check_finite(tree: Any, where: str) -> None:
    """Raises an error if an array contains NaN or infinity, since all results computed from it would be NaN.

    Raises:
        UserError: An array is not finite; the message names the first one.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    floats = [(path, leaf) for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    for (path, _), finite in zip(floats, jax.device_get(_all_finite([leaf for _, leaf in floats])), strict=True):
        if not finite:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"{where}: {name} contains NaN or infinity; use an older checkpoint, or train again")


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def fingerprint(params: dict) -> str:
    """Hash of names, shapes, dtypes and bits of parameters, without heads: 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    leaves, _ = jax.tree_util.tree_flatten_with_path(without_heads(params))
    for path, leaf in leaves:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _abstract_params(config: Config) -> dict:
    """Shapes and dtypes of the parameters that a run trains, placed on one device."""
    return on_one_device(jax.eval_shape(lambda: init_split(config)[0]))


def frozen_params(run_dir: Path, config: Config, base_dir: str, strict: bool, notify: Callable[[str], None]) -> dict:
    """The frozen parameters of a run, read from its base, in the run's dtype."""
    base = load_run(Path(base_dir).expanduser(), strict=strict, notify=notify)
    _check_base(run_dir, base.params, base_dir)
    return jax.jit(lambda given: init_split(config, given)[1])(without_heads(base.params))


def _check_base(run_dir: Path, params: dict, base_dir: str) -> None:
    try:
        expected = str(json.loads((run_dir / BASE_FILE).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{run_dir / BASE_FILE}: cannot be read ({type(error).__name__}: {error}); restore it, or train again"
        ) from None
    if fingerprint(params) != expected:
        raise UserError(
            f"{run_dir}: was trained with another base than {base_dir}: its parameters are not those that"
            f" {BASE_FILE} identifies ({expected[:8]}); give the right run as base, or train again"
        )


def on_one_device(shapes: Any) -> Any:
    """Adds the sharding of this process's first device to shapes and dtypes."""
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)
