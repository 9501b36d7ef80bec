"""Figures of runs as PNG files, for papers and slides. They need the extra `report`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax.errors import UserError
from gptjax.report.charts import charts_of, heat_maps_of, table_of
from gptjax.report.record import RunRecord

COLORS = ("#0072b2", "#d55e00", "#009e73", "#a3478b", "#b58900", "#4d4dbf")


def save_figures(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Writes one figure for each chart and heat map of the report; returns their paths.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'gptjax[report]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    tables = {(run, t): table_of(record, t) for run, record in enumerate(records) for t in ("steps", "evaluations")}
    paths = []
    for chart in charts_of(records):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for index, series in enumerate(chart.series):
            table, measured = tables[series.run, series.table], series.table == "evaluations"
            label = "validation" if measured else "training"
            if len(records) > 1:
                label = f"{_plain(records[series.run].name)} {label}"
            color = COLORS[(series.run if len(records) > 1 else index) % len(COLORS)]
            values = [float("nan") if value is None else value for value in table[series.column]]
            style = "--o" if measured else "-"
            axes.plot(table["step"], values, style, color=color, label=label, linewidth=1.2, markersize=3)
        axes.set(xlabel="step", title=_plain(chart.title), ylabel=_plain(chart.unit or chart.title))
        axes.grid(alpha=0.3)
        axes.legend()
        paths.append(folder / f"{_file_name(chart.key)}.png")
        figure.savefig(paths[-1], dpi=150)
    for heat in heat_maps_of(records):
        figure = Figure(figsize=(6.4, max(2.5, 1.2 + 0.22 * len(heat.rows))), layout="constrained")
        axes = figure.subplots()
        values = np.array(heat.values, np.float64)  # None becomes NaN, which is left blank
        norm = LogNorm() if np.nanmin(values) > 0 else None
        shown = axes.pcolormesh(heat.steps, np.arange(len(heat.rows)), values, norm=norm, shading="nearest")
        axes.set_yticks(range(len(heat.rows)), [name.replace("_", " ") for name in heat.rows], fontsize=7)
        run = f" of {records[heat.run].name}" if len(records) > 1 else ""
        axes.set(xlabel="step", title=_plain(heat.title + run))
        figure.colorbar(shown, label=heat.unit)
        paths.append(folder / f"{_file_name(f'{heat.key}_by_layer{heat.run or str()}')}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _plain(text: str) -> str:
    """Escapes the characters that matplotlib interprets as mathematics."""
    return text.replace("$", r"\$")


def _file_name(key: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in key)
