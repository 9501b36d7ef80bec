"""Makes a run's config from a file, a run directory, or defaults for the machine."""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gptjax.config.dial import DialConfig, dial
from gptjax.config.reader import differing_fields, flatten, load_config, make_config, read_yaml, to_flat
from gptjax.config.run import Config
from gptjax.errors import UserError

CONFIG_FILE = "config.yaml"

SMALL = {
    "model": {"n_layer": 4, "n_head": 4, "n_embd": 192, "block_size": 128},
    "tokenizer": {"kind": "bpe", "vocab_size": 2048},
    "optim": {"learning_rate": 2e-3, "beta2": 0.99},
    "train": {"num_steps": 1000, "batch_size": 16, "eval_every": 200, "eval_windows": 128, "save_every": 200},
}
"""For a CPU: the shape of configs/demo.yaml, about two minutes on two cores."""
MEDIUM = {
    "model": {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 512, "vocab_multiple": 128},
    "tokenizer": {"kind": "bpe", "vocab_size": 8192},
    "optim": {"learning_rate": 1e-3, "beta2": 0.95},
    "train": {"num_steps": 5000, "batch_size": 64, "eval_every": 500, "eval_windows": 512, "save_every": 1000},
}
"""For a GPU or TPU."""
FINETUNED = {"optim": {"learning_rate": 5e-4, "beta2": 0.99}, "train": {"num_steps": 500, "eval_every": 100}}
"""Defaults of a run with `init_from`."""
NOT_INHERITED = ("model.dropout", "model.adapter.")
"""Model options that a run with `init_from` can set."""
NO_DIAL = DialConfig()
WARMUP = 100
"""Number of warm-up steps, at most a tenth of the run."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """The file that a run's config was made of, such as a preset."""

    file: str
    """As it was named on the command line."""
    changed: dict[str, tuple]
    """Maps each option that was given another value on the command line to `(value of the file, value)`."""


@dataclasses.dataclass(frozen=True)
class Start:
    """A run's config and its origin."""

    config: Config
    note: str = ""
    """Log lines about options that the user did not set; empty: none."""
    origin: Origin | None = None
    """None: the run has no config file, or the file alone is not a valid config."""


def start_config(
    place: str, flags: dict, accelerator: bool, dial_options: DialConfig = NO_DIAL, corpus_bytes: int = 0
) -> Start:
    """Returns the config of a run.

    Args:
        place: A config file or a run directory; empty: the run directory of the flags if it contains a run, else the
            defaults.
        flags: Nested values of `read_flags`; they take precedence.
        accelerator: Whether the run will use a GPU or TPU, which selects the defaults.
        dial_options: Size of the model, used instead of the defaults if the run has no config yet.
        corpus_bytes: Size of the text, for `dial`; 0: unknown.

    Raises:
        UserError: The place is neither a config file nor a run directory, or a value is not allowed.
    """
    depth = dial_options.layers
    if place and depth:
        raise UserError(f"size and depth have no effect with {place}, which has a config; leave them out")
    if depth and flags.get("init_from"):
        raise UserError(f"size and depth have no effect with init_from={flags['init_from']}, whose model is used")
    if place and not Path(place).is_dir():
        config = load_config(place, flags)
        _check_base(config, {*flatten(flags), *flatten(read_yaml(Path(place)))})
        return Start(config, origin=_origin(place, config))
    run_dir = Path(place or flags.get("run_dir", Config.run_dir)).expanduser()
    if (run_dir / CONFIG_FILE).is_file():
        return Start(_resumed(run_dir, flags), f"config      {run_dir / CONFIG_FILE}")
    if place:
        raise UserError(f"{place}: no run directory (it has no {CONFIG_FILE}); give a config file or a run directory")
    if depth:
        dialed = dial(depth, corpus_bytes)
        values = {name: dict(section) for name, section in dialed.values.items()}
        if "batch_size" in flags.get("train", {}):  # the default micro-batch may not divide it
            values["train"].pop("micro_batch_size", None)
        config = make_config(_fitted(values, flags), flags, "defaults")
        note = f"config      chosen for depth {depth}; your own options take precedence\n" + "\n".join(dialed.lines)
        return Start(config, f"{note}\n            {config.run_dir}/{CONFIG_FILE} will list every option")
    config = make_config(_defaults(flags, accelerator), flags, "defaults")
    _check_base(config, flatten(flags))
    return Start(config, _describe(config, accelerator))


def _origin(file: str, config: Config) -> Origin | None:
    try:
        return Origin(file, differing_fields(load_config(file), config))
    except UserError:
        return None


def _check_base(config: Config, given: Collection[str]) -> None:
    """Checks that options of model and tokenizer do not differ from those of the run in `init_from`.

    Raises:
        UserError: One of them differs, and would have no effect.
    """
    path = Path(config.init_from).expanduser() / CONFIG_FILE
    if not config.init_from or not path.is_file():
        return
    base, own = to_flat(load_run_config(path.parent)), to_flat(config)
    for name in sorted(given):
        inherited = name.startswith(("model.", "tokenizer.")) and not name.startswith(NOT_INHERITED)
        if inherited and own[name] != base[name] and (name, own[name]) != ("model.vocab_size", 0):
            raise UserError(
                f"{name}={own[name]!r} has no effect with init_from={config.init_from}, whose model and tokenizer are"
                f" used: {name}={base[name]!r}; leave it out"
            )


def load_run_config(run_dir: Path, flags: dict | None = None) -> Config:
    """Returns the config in a run directory; `flags` (nested values of `read_flags`) take precedence.

    The run may be of an older version that allowed an option without effect. Such an option gets its default.

    Raises:
        UserError: The file is missing or damaged, or a value is not allowed.
    """
    path, flags = run_dir / CONFIG_FILE, flags or {}
    values = read_yaml(path)
    while True:
        try:
            return make_config(values, flags, str(path))
        except UserError as error:
            if not error.unused or error.unused in flatten(flags) or not _remove(values, error.unused):
                raise


def _remove(values: Any, option: str) -> bool:
    """Removes an option from nested values and from those of parts; returns whether it was there."""
    if isinstance(values, list):
        return any(_remove(item, option) for item in values)
    if not isinstance(values, dict):
        return False
    *sections, name = option.split(".")
    holder: Any = values
    for section in sections:
        holder = holder.get(section) if isinstance(holder, dict) else None
    if isinstance(holder, dict) and name in holder:
        del holder[name]
        return True
    return any(_remove(item, option) for item in values.values())


def _resumed(run_dir: Path, flags: dict) -> Config:
    """The config in a run directory; `run_dir` becomes this directory, which may have been moved."""
    config = load_run_config(run_dir, flags)
    if "run_dir" in flags or Path(config.run_dir).expanduser().resolve() == run_dir.resolve():
        return config
    return dataclasses.replace(config, run_dir=str(run_dir))


def _defaults(flags: dict, accelerator: bool) -> dict:
    """Values for a run without a config file, except those that would have no effect with the flags."""
    sized = FINETUNED if flags.get("init_from") else MEDIUM if accelerator else SMALL
    return _fitted({name: dict(section) for name, section in sized.items()}, flags)


def _fitted(values: dict, flags: dict) -> dict:
    """The values that have an effect with the flags, plus warm-up and final learning rate."""
    task, tokenizer, optim, train = (flags.get(name, {}) for name in ("task", "tokenizer", "optim", "train"))
    if "kind" in tokenizer:
        values.pop("tokenizer", None)
    if task.get("kind", "pretrain") != "pretrain":
        values["train"].pop("eval_windows", None)
    steps = train.get("num_steps", values["train"]["num_steps"])
    if train.get("num_epochs"):
        del values["train"]["num_steps"]
    if optim.get("warmup_fraction"):
        values["optim"].pop("warmup_steps", None)
    elif isinstance(steps, int):
        values["optim"]["warmup_steps"] = max(0, min(WARMUP, steps // 10))
    peak = optim.get("learning_rate", values["optim"]["learning_rate"])
    if optim.get("schedule") not in ("constant", "inverse_sqrt"):
        values["optim"] |= _final_rate(peak)
    return values


def _final_rate(peak: object) -> dict[str, float]:
    """A tenth of a schedule's peak; nothing for values that are no number, which are rejected elsewhere."""
    try:
        rate = float(str(peak)) / 10
    except ValueError:
        return {}
    return {"min_learning_rate": rate} if math.isfinite(rate) else {}


def _describe(config: Config, accelerator: bool) -> str:
    if config.init_from:
        shape = f"model and tokenizer of {config.init_from}"
    else:
        model, tokenizer = config.model, config.tokenizer
        vocabulary = f" of {tokenizer.vocab_size:,} tokens" if tokenizer.kind == "bpe" else ""
        shape = (
            f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, {model.block_size} tokens of context,"
            f" {tokenizer.kind} tokenizer{vocabulary}"
        )
    machine = "a GPU or TPU" if accelerator else "a CPU"
    return (
        f"config      no file: defaults for {machine}: {shape}, {config.train.num_steps:,} steps;"
        f" {config.run_dir}/{CONFIG_FILE} will list them all"
    )
