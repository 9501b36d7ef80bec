"""The file of a sweep: a config, and the options that differ between its runs."""

import dataclasses
import hashlib
import itertools
import math
import random
import re
from pathlib import Path
from typing import Any

from gptjax.config.reader import flag_types, flatten, load_config, merged, read_yaml, set_option
from gptjax.config.run import Config
from gptjax.errors import UserError, did_you_mean

KEYS = ("config", "run_dir", "method", "runs", "seed", "options")
RANGE = ("min", "max", "scale")
MOST_RUNS = 10_000


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """Made from its options, so that it stays the same if the sweep gets more runs."""
    options: dict[str, Any]
    """Values by dotted names of options."""
    config: Config


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All runs of a sweep."""

    run_dir: Path
    """Folder of all runs."""
    runs: list[SweepRun]
    """In the order of the file's options."""
    repeated: int = 0
    """Draws that are equal to an earlier one, and therefore no run."""


def load_sweep(path: Path, overrides: dict) -> Sweep:
    """Reads a sweep's file and makes the config of every run.

    Args:
        path: YAML with `config`, `run_dir`, `method` (grid or random), `options`, and for random `runs` and `seed`.
        overrides: Nested values for all runs, from the command line.

    Raises:
        UserError: A key or an option is unknown, or a value is not allowed.
    """
    values = read_yaml(path)
    for key in values:
        if key not in KEYS:
            raise UserError(
                f"{path}: unknown key {key!r}.{did_you_mean(str(key), KEYS)} Valid keys: {', '.join(KEYS)}."
            )
    for key in ("config", "run_dir", "options"):
        if not values.get(key):
            raise UserError(f"{path}: {key} is missing")
        if key != "options" and not isinstance(values[key], str):
            raise UserError(f"{path}: {key}={values[key]!r} must be text, the path of a file or folder")
    options, method = values["options"], values.get("method", "grid")
    if not isinstance(options, dict):
        raise UserError(f"{path}: options must hold `section.key: [values]` lines")
    known, given = flag_types(Config), flatten(overrides)
    for name in options:
        if name not in known or name == "run_dir":
            raise UserError(f"{path}: options: unknown option {name!r}.{did_you_mean(str(name), known)}")
    for name in given:
        if name == "run_dir" or name in options:
            raise UserError(f"command line: --{name} has no effect: {path} sets {name}; change it there")
    if method == "grid":
        for key in ("runs", "seed"):
            if key in values:
                raise UserError(f"{path}: {key} has no effect with method: grid; leave it out")
        chosen = _grid(path, options)
    elif method == "random":
        chosen = _random(path, options, values.get("runs", 0), values.get("seed", 0))
    else:
        raise UserError(f"{path}: method={method!r} must be grid or random")
    folder, file = Path(values["run_dir"]), Path(values["config"]).expanduser()
    runs: dict[Config, SweepRun] = {}
    for each in chosen:
        nested: dict = {"run_dir": str(folder / "run")}  # replaced by the folder of each run below
        for option, value in each.items():
            set_option(nested, option, value)
        config = load_config(file, merged(overrides, nested))
        if config not in runs:
            name = _name(each)
            runs[config] = SweepRun(name, each, dataclasses.replace(config, run_dir=str(folder / name)))
        elif method == "grid":
            words = " ".join(f"{name}={value}" for name, value in each.items())
            raise UserError(f"{path}: options: {words} is the same run twice; give every value once")
    return Sweep(folder, list(runs.values()), repeated=len(chosen) - len(runs))


def _grid(path: Path, options: dict) -> list[dict]:
    for name, values in options.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: options: {name} must be a list of values with method: grid")
    if math.prod(len(values) for values in options.values()) > MOST_RUNS:
        raise UserError(f"{path}: options: more than {MOST_RUNS:,} combinations")
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def _random(path: Path, options: dict, runs: Any, seed: Any) -> list[dict]:
    if type(runs) is not int or not 1 <= runs <= MOST_RUNS:
        raise UserError(f"{path}: runs={runs!r} must be a number of runs from 1 to {MOST_RUNS:,}")
    if type(seed) is not int:
        raise UserError(f"{path}: seed={seed!r} must be a whole number")
    found = []
    for number in range(
        runs
    ):  # each run has its own random generator, so that adding runs does not change the first ones
        chance = random.Random(f"{seed} {number}")
        found.append({name: _drawn(path, name, values, chance) for name, values in options.items()})
    return found


def _drawn(path: Path, name: str, values: Any, chance: random.Random) -> Any:
    if isinstance(values, list) and values:
        return chance.choice(values)
    if not isinstance(values, dict) or set(values) - set(RANGE) or not {"min", "max"} <= set(values):
        raise UserError(f"{path}: options: {name} must be a list, or min, max and scale (linear or log)")
    kind = flag_types(Config)[name]
    if kind not in (int, float):
        raise UserError(f"{path}: options: {name} is no number; give a list of its values, not min and max")
    try:
        low, high = (math.nan if isinstance(values[key], bool) else float(values[key]) for key in ("min", "max"))
    except (TypeError, ValueError, OverflowError):  # YAML 1.1 reads 1e-3 as text
        low = high = math.nan
    if not math.isfinite(low + high):
        raise UserError(f"{path}: options: {name}: min={values['min']!r} and max={values['max']!r} must be numbers")
    scale = values.get("scale", "linear")
    if scale not in ("linear", "log") or not low < high or (scale == "log" and low <= 0):
        raise UserError(f"{path}: options: {name}: needs min < max, and scale linear, or log with min above 0")
    if kind is int:
        if low % 1 or high % 1:
            raise UserError(f"{path}: options: {name}: min={low:g} and max={high:g} must be whole numbers")
        return chance.randint(round(low), round(high)) if scale == "linear" else round(_log(low, high, chance))
    drawn = chance.uniform(low, high) if scale == "linear" else _log(low, high, chance)
    return min(max(float(f"{drawn:.4g}"), low), high)


def _log(low: float, high: float, chance: random.Random) -> float:
    return math.exp(chance.uniform(math.log(low), math.log(high)))


def _name(options: dict) -> str:
    """A folder's name from the options; if they do not fit, they are shortened and a checksum is added."""
    full = ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in options.items())
    short = re.sub(r"[^A-Za-z0-9._,=+-]", "_", full)[:80]
    identity = ",".join(f"{name}={value!r}" for name, value in options.items())
    return f"{short}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}"
