"""The report of one run, or of several side by side, as one HTML file."""

import dataclasses
import datetime
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptjax.config.reader import to_yaml
from gptjax.files import write_atomic
from gptjax.report.charts import (
    AXES,
    MOST_POINTS,
    NO_AXIS,
    Chart,
    charts_of,
    heat_maps_of,
    parallel_axes,
    table_of,
    tokens_per_step,
)
from gptjax.report.cost import readable_count, readable_time
from gptjax.report.page import escape, page
from gptjax.report.record import RunRecord, changed_options, is_number, options_that_differ
from gptjax.report.reference import Reference, references

REPORT_FILE = "report.html"
MOST_EVENTS = 300
"""Largest number of rows in the table of events; if there are more, the first and the last ones are shown."""
MOST_SAMPLES = 40
MOST_SIDE_BY_SIDE = 6
"""Runs that are compared in columns, with samples and events of each; more are a table with a row for each."""


def write_report(records: Sequence[RunRecord], path: Path) -> None:
    """Writes the page of `render` to `path` atomically."""
    write_atomic(path, render(records).encode("utf-8", "replace"))


def render(records: Sequence[RunRecord]) -> str:
    """Returns the page. All text from users or models is escaped."""
    many = len(records) > MOST_SIDE_BY_SIDE
    title = f"{len(records)} runs" if many else " · ".join(record.name for record in records)
    shown = [] if many else records
    body = [
        f"<h1>{escape(title)}</h1>",
        *(_run_head(records[0]) if len(records) == 1 else [_ranking(records) if many else _comparison(records)]),
        '<div id="parallel"></div>' if parallel_axes(records) else "",
        '<h2>Charts</h2>\n<div class="controls" id="controls"></div>',
        '<p class="hint">Drag over a chart to zoom all of them, double-click to see the whole run again.</p>',
        *_notes(records),
        '<div class="charts" id="charts"></div>',
        *(_samples(record, several=len(records) > 1) for record in shown),
        "" if many else _differences(records) if len(records) > 1 else _config(records[0]),
        *(part(record, several=len(records) > 1) for part in (_data_summary, _about, _events) for record in shown),
    ]
    return page(f"{title} · gptjax", "\n".join(part for part in body if part), _data(records), "report.js")


def _data(records: Sequence[RunRecord]) -> dict:
    charts = charts_of(records)
    wanted = {(series.run, series.table, series.column) for chart in charts for series in chart.series}
    runs = []
    for number, record in enumerate(records):
        tables: dict = {"name": record.name}
        if (reference := references().get(str(record.facts.get("reference")))) is not None:
            tables["reference"] = _reference_table(record, reference)
        for table in ("steps", "evaluations"):
            columns = table_of(record, table)
            used = {name for run, of, name in wanted if (run, of) == (number, table)} | {"step", "tokens"}
            tables[table] = {name: values for name, values in columns.items() if name in used}
        runs.append(tables)
    return {
        "runs": runs,
        "charts": [
            {
                "title": chart.title,
                "unit": chart.unit,
                "series": [{"run": s.run, "table": s.table, "column": s.column} for s in chart.series]
                + ([{"run": 0, "table": "reference", "column": "val_loss"}] if _has_reference(chart, runs) else []),
            }
            for chart in charts
        ],
        "labels": {"steps": "training", "evaluations": "validation", "reference": "reference"},
        "heat_maps": [
            {
                "title": heat.title + (f" of {records[heat.run].name}" if len(records) > 1 else ""),
                "unit": heat.unit,
                "rows": [name.replace("_", " ") for name in heat.rows],
                "step": heat.steps,
                "tokens": heat.tokens,
                "values": heat.values,
            }
            for heat in heat_maps_of(records)
        ],
        "parallel": [dataclasses.asdict(axis) for axis in parallel_axes(records)],
        "marks": _marks(records[0]) if len(records) == 1 else [],
        "axes": AXES,
        "logX": False,
    }


def _has_reference(chart: Chart, runs: list[dict]) -> bool:
    """Whether the chart of the losses of a single run shows the reference."""
    return chart.key == "loss" and len(runs) == 1 and "reference" in runs[0]


def _reference_table(record: RunRecord, reference: Reference) -> dict[str, list]:
    per_step = tokens_per_step(record)
    low, high = (
        [mean + sign * band for mean, band in zip(reference.val_loss, reference.band, strict=True)] for sign in (-1, 1)
    )
    tokens = [step * per_step for step in reference.evaluated]
    return {"step": reference.evaluated, "tokens": tokens, "val_loss": reference.val_loss, "low": low, "high": high}


def _marks(record: RunRecord) -> list[dict]:
    per_step = next((row["tokens"] / row["step"] for row in record.steps if row.get("tokens") and row["step"]), 0)
    found = [
        (event["step"], f"resumed at step {event['step']}") for event in record.events if event["event"] == "resume"
    ]
    found += [(row["step"], f"step {row['step']} made no update") for row in record.skips[:MOST_EVENTS]]
    return [{"step": step, "tokens": step * per_step, "text": text} for step, text in found]


def _run_head(record: RunRecord) -> list[str]:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in _summary(record)
    )
    return [f'<p class="soft">{escape(str(record.run_dir))}</p>', f'<div class="tiles">{tiles}</div>']


def _summary(record: RunRecord) -> list[tuple[str, str]]:
    """Names and values of the summary at the top."""
    step = max((row["step"] for row in [*record.steps, *record.evaluations]), default=0)
    found = [("steps", f"{step:,} of {record.config.train.num_steps:,}")]
    best = record.best
    if best is not None:
        found.append((f"best validation loss, step {best['step']:,}", f"{best['val_loss']:.4f}"))
        for name, title in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte")):
            if is_number(best.get(name)):
                found.append((f"{title} at that step", f"{best[name]:.4g}"))
        for name, value in best.items():
            if name not in ("step", "val_loss", "perplexity", "bits_per_byte") and is_number(value):
                found.append((f"{name} at that step", f"{value:.4g}"))
    found += _to_reference(record)
    losses = [row["loss"] for row in record.steps if is_number(row.get("loss"))]
    if losses:
        found.append(("training loss, mean of the last 10 logged", f"{statistics.fmean(losses[-10:]):.4f}"))
    if record.steps and is_number(record.steps[-1].get("tokens")):
        found.append(("tokens trained on", readable_count(record.steps[-1]["tokens"])))
    for name, title, shown in (("tokens_per_s", "tokens/s, median", "{:,.0f}"), ("mfu", "MFU, median", "{:.1%}")):
        values = [row[name] for row in record.steps if is_number(row.get(name))]
        if values:
            found.append((title, shown.format(statistics.median(values))))
    if (seconds := _seconds(record)) is not None:
        found.append(("time, pauses left out", readable_time(seconds)))
    if record.skips:
        found.append(("steps without an update", f"{len(record.skips):,}"))
    return found


def _to_reference(record: RunRecord) -> list[tuple[str, str]]:
    """How far the last validation loss is from the reference of the run's preset."""
    reference = references().get(str(record.facts.get("reference")))
    last = next((row for row in reversed(record.evaluations) if is_number(row.get("val_loss"))), None)
    if reference is None or last is None or (there := reference.validation(last["step"], last["val_loss"])) is None:
        return []
    name = f"validation loss to the reference of {reference.preset} at step {last['step']:,}, band {there[1]:.4f}"
    return [(name, f"{there[0]:+.4f}")]


def _seconds(record: RunRecord) -> float | None:
    """Total time between each start and the last event before the next start."""
    total, began, last = 0.0, None, None
    for event in record.events:
        if event["event"] in ("start", "resume"):
            if began is not None and last is not None:
                total += last - began
            began = event["time"]
        last = event["time"]
    return None if began is None or last is None else total + last - began


def _comparison(records: Sequence[RunRecord]) -> str:
    summaries = [dict(_summary(record)) for record in records]
    names = list(dict.fromkeys(_without_step(name) for summary in summaries for name in summary))
    rows = []
    for name in names:
        values = [next((v for n, v in summary.items() if _without_step(n) == name), "-") for summary in summaries]
        rows.append([name, *values])
    return "<h2>Summary</h2>" + _table(["", *(record.name for record in records)], rows)


def _ranking(records: Sequence[RunRecord]) -> str:
    """A row for each run, the lowest validation loss first: the options that differ, and the result."""
    differing = options_that_differ(list(records))
    names = [name for name in differing if name not in NO_AXIS]
    rows = []
    for number, record in enumerate(records):
        best = record.best
        result = ["-", "-"] if best is None else [f"{best['val_loss']:.4f}", f"{best['step']:,}"]
        rows.append([record.name, *result, *(_shown(differing[name][number]) for name in names)])
    rows.sort(key=lambda row: float("inf") if row[1] == "-" else float(row[1]))
    hint = '<p class="hint">Samples, config and events are in the report of each run.</p>'
    return "<h2>Runs</h2>" + _table(["run", "best validation loss", "at step", *names], rows) + hint


def _without_step(name: str) -> str:
    return name.partition(", step ")[0]


def _notes(records: Sequence[RunRecord]) -> list[str]:
    notes = []
    for record in records:
        if len(record.steps) > MOST_POINTS:
            notes.append(
                f"{record.name}: drawn are {MOST_POINTS:,} of {len(record.steps):,} logged steps, with the lowest and"
                " the highest loss of each stretch."
            )
        if record.damaged_events:
            notes.append(f"{record.name}: {record.damaged_events} lines of events.jsonl could not be read.")
    without = [record.name for record in records if record.steps and not any("mfu" in row for row in record.steps)]
    if without:
        names = "all runs" if len(without) == len(records) > 1 else ", ".join(without)
        notes.append(f"{names}: no MFU, because the peak of the device is not known.")
    return [f'<p class="hint">{escape(note)}</p>' for note in notes]


def _samples(record: RunRecord, several: bool) -> str:
    if not record.samples:
        return ""
    prompt = record.config.train.sample_prompt
    shown = record.samples if len(record.samples) <= MOST_SAMPLES else _spread(record.samples, MOST_SAMPLES)
    parts = [f"<h2>Samples{_of(record, several)}</h2>"]
    left_out = len(record.samples) - len(shown)
    more = f"; {left_out:,} more in samples.txt" if left_out else ""
    parts.append(f'<p class="hint">The prompt is coloured; temperature 0.8{more}.</p>')
    for number, (step, text) in enumerate(reversed(shown)):
        start = text.find(prompt) + len(prompt) if prompt and prompt in text else 0
        marked = f"<mark>{escape(text[:start])}</mark>{escape(text[start:])}"
        is_open = " open" if number < 2 else ""
        parts.append(f"<details{is_open}><summary>step {step:,}</summary><pre>{marked}</pre></details>")
    return "\n".join(parts)


def _spread(items: list, count: int) -> list:
    """Evenly spaced items, the first and the last among them."""
    return [items[round(n * (len(items) - 1) / (count - 1))] for n in range(count)]


def _config(record: RunRecord) -> str:
    changed = changed_options(record.config)
    origin = record.origin
    preset = ""
    if origin:
        own = [[name, _shown(value), _shown(of_file)] for name, (of_file, value) in origin["changed"].items()]
        preset = f"<h3>Changed from {escape(origin['file'])}</h3>" + (
            _table(["option", "value", "in the file"], own) if own else '<p class="hint">No option.</p>'
        )
        preset += "<h3>Changed from the defaults</h3>"
    rows = [[name, _shown(value), _shown(default)] for name, (default, value) in changed.items()]
    return (
        "<h2>Config</h2>"
        + preset
        + _table(["option", "value", "default"], rows)
        + f"<details><summary>every option</summary><pre>{escape(to_yaml(record.config))}</pre></details>"
    )


def _differences(records: Sequence[RunRecord]) -> str:
    rows = [[name, *map(_shown, values)] for name, values in options_that_differ(list(records)).items()]
    return "<h2>Options that differ</h2>" + _table(["option", *(record.name for record in records)], rows)


def _data_summary(record: RunRecord, several: bool) -> str:
    """Sizes of the data, as the newest start of the run counted them."""
    rows = record.facts.get("data")
    if not isinstance(rows, list) or not rows:
        return ""
    shown = []
    for row in rows:
        sizes = {name: row[name] for name in ("examples", "documents", "tokens", "bytes") if is_number(row.get(name))}
        if sizes.get("tokens") and "bytes" in sizes:
            sizes["bytes per token"] = round(sizes["bytes"] / sizes["tokens"], 3)
        left_out = row.get("left out", {})
        words = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items()) if isinstance(left_out, dict) else ""
        shown.append([str(row.get("source", "")), str(row.get("split", "")), sizes, words])
    names = list(dict.fromkeys(name for row in shown for name in row[2]))
    table = [
        [source, split, *(f"{sizes.get(name, ''):,}" if name in sizes else "" for name in names), words]
        for source, split, sizes, words in shown
    ]
    return f"<h2>Data{_of(record, several)}</h2>" + _table(["source", "split", *names, "left out"], table)


def _about(record: RunRecord, several: bool) -> str:
    """Model, layout and environment, from the newest start of the run."""
    described, versions = record.facts.get("facts", []), record.facts.get("versions", {})
    rows = [[str(name), str(text)] for name, text in [*described, *versions.items()]]
    if not rows:
        return ""
    return f"<h2>Environment{_of(record, several)}</h2>" + _table(["", ""], rows)


def _events(record: RunRecord, several: bool) -> str:
    happened = [(event["step"], event["time"], event["event"], _detail(event)) for event in record.events] + [
        (row["step"], None, "no update", _why_skipped(row)) for row in record.skips
    ]
    happened.sort(key=lambda row: row[0])
    note = ""
    if len(happened) > MOST_EVENTS:
        note = f'<p class="hint">{len(happened) - MOST_EVENTS:,} events in the middle are left out.</p>'
        happened = [*happened[: MOST_EVENTS // 2], *happened[-MOST_EVENTS // 2 :]]
    rows = [[f"{step:,}", "" if at is None else _clock(at), what, detail] for step, at, what, detail in happened]
    if not rows:
        return ""
    return f"<h2>Events{_of(record, several)}</h2>{note}" + _table(["step", "time (UTC)", "event", ""], rows)


def _detail(event: dict) -> str:
    known = (
        *("time", "event", "step", "facts", "versions", "flops_per_token", "peak_flops"),
        *("data", "origin", "reference"),
    )
    return ", ".join(f"{name}: {_shown(value)}" for name, value in event.items() if name not in known)


def _why_skipped(row: dict) -> str:
    skip = row["skip"] if isinstance(row["skip"], dict) else {}
    return f"{skip.get('reason')}: loss {skip.get('loss')}, gradient norm {skip.get('grad_norm')}"


def _clock(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    top = f"<tr>{head}</tr>" if any(heads) else ""
    return '<div class="scroll"><table>' + top + "\n".join(lines) + "</table></div>"


def _of(record: RunRecord, several: bool) -> str:
    return f" of {escape(record.name)}" if several else ""


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
