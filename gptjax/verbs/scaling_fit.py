"""`gptjax scaling-fit`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from gptjax.config.reader import differing_fields
from gptjax.config.start import CONFIG_FILE
from gptjax.config.verbs.scaling_fit import ScalingFitConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.evaluation.scaling_law import Law, bootstrap, fit, interval
from gptjax.files import check_writable, write_atomic
from gptjax.machine.chips import CHIPS
from gptjax.model.gpt import init_params
from gptjax.report.cost import matmul_parameters, readable_count, readable_number
from gptjax.report.metrics import METRICS_FILE
from gptjax.report.page import chart_page
from gptjax.report.record import RunRecord, is_number, names_of, read_record

PAGE_FILE = "scaling_fit.html"
LEAST_RUNS = 12
LEAST_SIZES = 3
CURVE_POINTS = 40
SAME = ("data.", "sources", "mixture_temperature", "tokenizer.", "task.", "model.vocab_size")
"""Options that decide which tokens a validation loss is the mean of."""
MAY_DIFFER = ("data.packing", "data.verify", "data.skip")
"""Those of them that change nothing of the validation text."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A finished run."""

    name: str
    n: float
    """Parameters in matmuls."""
    d: float
    """Tokens."""
    loss: float
    """Validation loss after the last step, in nats per token."""


def run_scaling_fit(options: ScalingFitConfig) -> int:
    """Fits a scaling law to finished runs, predicts the run that was held back and a larger one; draws the fit.

    Raises:
        UserError: There are too few finished runs, or they are of too few sizes.
    """
    path = Path(options.out or PAGE_FILE).expanduser()
    check_writable("out", path)
    points = read_points([Path(place).expanduser() for place in options.runs])
    held = _held_back(points, options.hold_out)
    used = [point for point in points if point is not held]
    _check(used)
    n, d, loss = np.array([[point.n, point.d, point.loss] for point in used]).T
    law = fit(n, d, loss)
    laws = bootstrap(n, d, loss, law, options.bootstrap, options.seed)
    lines = describe(used, held, law, laws, options)
    print("\n".join(lines))
    write_atomic(path, render(used, held, law, lines).encode())
    print(path)
    return 0


def read_points(places: Sequence[Path]) -> list[Point]:
    """Reads run directories and folders of them; prints which ones are left out, and why.

    Raises:
        UserError: A place is neither, a run is named twice, or losses are not comparable: they are of other text, or
            of other tokens.
    """
    folders: list[Path] = []
    for place in places:
        inside = sorted(path.parent for path in place.glob(f"*/{CONFIG_FILE}"))
        if not inside and not (place / CONFIG_FILE).is_file():
            raise UserError(f"{place}: neither a run directory nor a folder that holds some")
        folders += [place] if (place / CONFIG_FILE).is_file() else inside
    resolved = [folder.resolve() for folder in folders]
    if twice := next((folder for folder in resolved if resolved.count(folder) > 1), None):
        raise UserError(f"{twice}: is named twice, and would count twice in the fit; name every run once")
    points, first = [], None
    for folder, name in zip(folders, names_of(folders), strict=True):
        record = read_record(folder, name) if (folder / METRICS_FILE).is_file() else None
        row = None if record is None else _last_evaluation(record)
        if record is None or row is None:
            print(f"left out    {name}: it has no evaluation after its last step, or no finite loss")
            continue
        first = first or record
        _check_comparable(first, record)
        model, tokens = record.config.model, record.steps[-1]["tokens"]
        shapes = jax.eval_shape(lambda model=model: init_params(model, jax.random.key(0)))
        points.append(Point(name, matmul_parameters(model, shapes), tokens, row["val_loss"]))
    return points


def _check_comparable(first: RunRecord, other: RunRecord) -> None:
    """Requires two runs that predict the same tokens of the same text."""
    if other.config.task.kind != "pretrain":
        raise UserError(f"{other.name}: has task.kind={other.config.task.kind}; a law is fitted to runs of pretrain")
    for name, (one, another) in differing_fields(first.config, other.config).items():
        if name.startswith(SAME) and name not in MAY_DIFFER:
            raise UserError(
                f"{first.name} and {other.name}: {name}={one!r} and {another!r}, so their losses are not of the same"
                " tokens; fit runs that differ in size and length alone"
            )


def describe(used: Sequence[Point], held: Point, law: Law, laws: Sequence[Law], options: ScalingFitConfig) -> list[str]:
    """The law, its intervals, and the predictions, as lines."""
    n, d = ([getattr(point, name) for point in used] for name in ("n", "d"))
    lines = [
        f"runs        {len(used)} fitted: {readable_count(min(n))} to {readable_count(max(n))} parameters in matmuls,"
        f" {readable_count(min(d))} to {readable_count(max(d))} tokens",
        "law         L(N, D) = E + A / N^alpha + B / D^beta, with 95 % intervals of the bootstrap",
    ]
    for name in ("E", "A", "alpha", "B", "beta"):
        low, high = interval([getattr(one, name) for one in laws])
        lines.append(f"            {name:5} {getattr(law, name):.4g}  ({low:.4g} to {high:.4g})")
    predicted = float(law.loss(held.n, held.d))
    low, high = interval([one.loss(held.n, held.d) for one in laws])
    lines += [
        f"held back   {held.name}: {readable_count(held.n)} parameters, {readable_count(held.d)} tokens",
        f"            measured {held.loss:.4f}, predicted {predicted:.4f} ({low:.4f} to {high:.4f}),"
        f" off by {100 * (predicted / held.loss - 1):+.2f} %",
    ]
    return lines + (_larger(law, laws, options) if options.params else [])


def _larger(law: Law, laws: Sequence[Law], options: ScalingFitConfig) -> list[str]:
    n, d = options.params, options.tokens
    low, high = interval([one.loss(n, d) for one in laws])
    flops = 6 * n * d
    hours = flops / (options.mfu * CHIPS[options.chip].peak_flops) / 3600
    cost = f", which cost {hours * options.price:,.2f} at {options.price:g} an hour" if options.price else ""
    if min(law.alpha, law.beta) > 0:
        best_n, best_d = law.optimum(flops)
        optimum = (
            f"the same FLOPs: {readable_count(best_n)} parameters, {readable_count(best_d)} tokens: loss"
            f" {law.loss(best_n, best_d):.4f}"
        )
    else:
        optimum = "none: by this law, more parameters or more tokens do not lower the loss; fit more runs"
    return [
        f"predicted   {readable_count(n)} parameters, {readable_count(d)} tokens: loss {law.loss(n, d):.4f}"
        f" ({low:.4f} to {high:.4f})",
        f"            {flops:.3g} FLOPs (6 N D) = {readable_number(hours)} hours of one {options.chip} at"
        f" {options.mfu:.0%} of its peak{cost}",
        f"optimum     {optimum}",
    ]


def render(used: Sequence[Point], held: Point, law: Law, lines: Sequence[str]) -> str:
    """The page with the chart: for each size of model the measured losses and the fitted curve."""
    points = [*used, held]
    least, most = min(point.d for point in points), max(point.d for point in points)
    grid = np.geomspace(least, most, CURVE_POINTS)
    runs = []
    for n in sorted({point.n for point in points}):
        own = sorted((point for point in points if point.n == n), key=lambda point: point.d)
        runs.append(
            {
                "name": f"{readable_count(n)} parameters,",
                "steps": {"tokens": grid.tolist(), "loss": np.asarray(law.loss(n, grid)).tolist()},
                "evaluations": {"tokens": [point.d for point in own], "loss": [point.loss for point in own]},
            }
        )
    series = [
        {"run": run, "table": table, "column": "loss"} for table in ("steps", "evaluations") for run in range(len(runs))
    ]
    data = {
        "runs": runs,
        "charts": [{"title": "Loss by size of model and tokens", "unit": "nats per token", "series": series}],
        "labels": {"steps": "fitted", "evaluations": "measured"},
        "marks": [{"tokens": held.d, "text": f"held back: {held.name}"}],
        "axes": ["tokens"],
        "logX": True,
    }
    return chart_page("Scaling law", lines, data)


def _last_evaluation(record: RunRecord) -> dict | None:
    last = [row for row in record.evaluations if row["step"] == record.config.train.num_steps]
    known = last and record.steps and all(map(is_number, (last[-1]["val_loss"], record.steps[-1].get("tokens"))))
    return last[-1] if known else None


def _held_back(points: Sequence[Point], name: str) -> Point:
    if len(points) < LEAST_RUNS + 1:
        raise UserError(f"{len(points)} finished runs: a fit needs at least {LEAST_RUNS}, and one that is held back")
    if not name:
        return max(points, key=lambda point: point.n * point.d)
    names = [point.name for point in points]
    if name not in names:
        raise UserError(f"hold_out={name!r} is no run that was read.{did_you_mean(name, names)}")
    return points[names.index(name)]


def _check(used: Sequence[Point]) -> None:
    for what, values in (("parameters", {p.n for p in used}), ("tokens", {p.d for p in used})):
        if len(values) < LEAST_SIZES:
            raise UserError(f"the runs have {len(values)} numbers of {what}; a fit needs at least {LEAST_SIZES}")
