"""Selects the charts of a report and their data. `html.py` draws them in a page, `figures.py` as PNG files."""

import dataclasses
from collections.abc import Sequence

from gptjax.report.record import RunRecord, is_number, options_that_differ

MOST_POINTS = 2000
"""Largest number of points of a line. Longer runs are thinned: see `thin`."""
TITLES = {
    "loss": ("Loss", "nats per token"),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_s": ("Throughput", "tokens/s"),
    "mfu": ("MFU", "share of the devices' peak"),
    "perplexity": ("Perplexity", "validation"),
    "bits_per_byte": ("Bits per byte", "validation"),
}
HEAT_TITLES = {
    "grad_norm": ("Gradient norm by layer", "before clipping"),
    "update_ratio": ("Update by layer", "norm of the update / norm of the weights"),
    "residual_rms": ("Residual stream by layer", "root mean square"),
    "attention_entropy": ("Entropy of attention by layer", "nats, mean of the heads"),
    "attention_entropy_min": ("Lowest entropy of attention by layer", "nats, head with the lowest"),
}
MOST_COLUMNS = 300
"""Steps of a heat map; of more, evenly spaced ones are drawn."""
AXES = ("step", "tokens")
NO_AXIS = ("run_dir", "cache_dir")
"""Options whose difference is no choice of the user's."""
HIDDEN = (*AXES, "val_loss", "targets")


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart."""

    run: int
    """Index of the run."""
    table: str
    """steps or evaluations."""
    column: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart over the steps of runs."""

    key: str
    title: str
    unit: str
    series: tuple[Series, ...]


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Numbers of layers over the steps of a run."""

    run: int
    """Index of the run."""
    key: str
    title: str
    unit: str
    rows: tuple[str, ...]
    """Layers, the first that data passes first."""
    steps: list[int]
    tokens: list[float]
    values: list[list[float | None]]
    """Values by row and step; None for missing values."""


def heat_maps_of(records: Sequence[RunRecord]) -> list[HeatMap]:
    """The heat maps of all runs, one for each quantity that was logged by layer."""
    maps = []
    for run, record in enumerate(records):
        for quantity in dict.fromkeys(name for row in record.layers for name in row["by_layer"]):
            of = [(row["step"], row["by_layer"][quantity]) for row in record.layers if quantity in row["by_layer"]]
            of = [of[len(of) * n // MOST_COLUMNS] for n in range(MOST_COLUMNS)] if len(of) > MOST_COLUMNS else of
            names = tuple(dict.fromkeys(name for _, numbers in of for name in numbers))
            title, unit = HEAT_TITLES.get(quantity, (quantity, ""))
            values = [[_rounded(numbers.get(name)) for _, numbers in of] for name in names]
            per_step = tokens_per_step(record)
            tokens = [_rounded(step * per_step) or 0 for step, _ in of]
            maps.append(HeatMap(run, quantity, title, unit, names, [step for step, _ in of], tokens, values))
    return maps


LEAST_PARALLEL = 3
"""Smallest number of runs for which a comparison shows parallel coordinates."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of parallel coordinates."""

    name: str
    values: list
    """Of each run: numbers, or texts where one of them is no number; None: unknown."""


def parallel_axes(records: Sequence[RunRecord]) -> list[Axis]:
    """The options that differ between runs, and last the best validation loss; empty: there is nothing to compare."""
    differing = {name: values for name, values in options_that_differ(list(records)).items() if name not in NO_AXIS}
    best = [None if record.best is None else _rounded(record.best["val_loss"]) for record in records]
    if len(records) < LEAST_PARALLEL or not differing or not any(value is not None for value in best):
        return []
    axes = [
        Axis(name, values if all(map(is_number, values)) else [str(value) for value in values])
        for name, values in differing.items()
    ]
    return [*axes, Axis("best validation loss", best)]


def charts_of(records: Sequence[RunRecord]) -> list[Chart]:
    """The charts of one or several runs: first the loss, then all other columns that change."""
    charts = []
    for table, column in _columns(records):
        title, unit = TITLES.get(column, (column, "validation" if table == "evaluations" else ""))
        series = [Series(run, table, column) for run, record in enumerate(records) if _has(record, table, column)]
        if column == "loss":
            series += [
                Series(run, "evaluations", "val_loss")
                for run, record in enumerate(records)
                if _has(record, "evaluations", "val_loss")
            ]
        charts.append(Chart(column, title, unit, tuple(series)))
    return charts


def table_of(record: RunRecord, table: str) -> dict[str, list]:
    """Columns of a run's rows, thinned out: `step`, `tokens`, and every numeric column; None for missing values.

    Args:
        record: The run.
        table: steps or evaluations.
    """
    rows = thin(record.steps) if table == "steps" else record.evaluations
    per_step = tokens_per_step(record)
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "tokens"]
    columns = {name: [_rounded(row.get(name)) for row in rows] for name in names}
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    return {"step": [], **columns, "tokens": [_rounded(row["step"] * per_step) for row in rows]}


def thin(rows: list[dict]) -> list[dict]:
    """At most `MOST_POINTS` rows: the first and last one, and those with the lowest and highest loss of each
    interval.
    """
    if len(rows) <= MOST_POINTS:
        return rows
    inner, stretches = len(rows) - 2, MOST_POINTS // 2 - 1
    kept = {0, len(rows) - 1}
    for n in range(stretches):
        stretch = range(1 + inner * n // stretches, 1 + inner * (n + 1) // stretches)
        known = [i for i in stretch if is_number(rows[i].get("loss"))]
        kept |= (
            {min(known, key=lambda i: rows[i]["loss"]), max(known, key=lambda i: rows[i]["loss"])}
            if known
            else {stretch[0]}
        )
    return [rows[i] for i in sorted(kept)]


def tokens_per_step(record: RunRecord) -> float:
    """Tokens of a step, by the first logged one; 0: unknown."""
    return next((row["tokens"] / row["step"] for row in record.steps if row.get("tokens") and row["step"]), 0)


def _columns(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """The first column of each chart, and its table."""
    found: dict[tuple[str, str], set] = {}
    for record in records:
        for table, rows in (("steps", record.steps), ("evaluations", record.evaluations)):
            for row in rows:
                for name, value in row.items():
                    if name not in HIDDEN and is_number(value):
                        found.setdefault((table, name), set()).add(value)
    known = list(TITLES)
    order = sorted(found, key=lambda pair: known.index(pair[1]) if pair[1] in known else len(known))
    kept = [pair for pair in order if pair[1] in TITLES or len(found[pair]) > 1]
    if not any(column == "loss" for _, column in kept) and any(record.evaluations for record in records):
        kept.insert(0, ("steps", "loss"))
    return kept


def _has(record: RunRecord, table: str, column: str) -> bool:
    rows = record.steps if table == "steps" else record.evaluations
    return any(is_number(row.get(column)) for row in rows)


def _rounded(value: object) -> float | int | None:
    """Rounds a number to six digits, enough for a chart."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
