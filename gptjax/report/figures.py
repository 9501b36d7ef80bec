"""Plain figures of runs as PNG files, for papers and slides; they need the extra `report`."""

from collections.abc import Sequence
from pathlib import Path

from gptjax.errors import UserError
from gptjax.report.charts import charts_of, table_of
from gptjax.report.record import RunRecord

COLORS = ("#0072b2", "#d55e00", "#009e73", "#a3478b", "#b58900", "#4d4dbf")


def save_figures(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Writes one figure for each chart of the report; returns their paths.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
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
    return paths


def _plain(text: str) -> str:
    """Text without the signs that matplotlib reads as mathematics."""
    return text.replace("$", r"\$")


def _file_name(key: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in key)
