"""The datasheet of prepared data: its sources and what was left out, as JSON and as an HTML page.

`data_report.json` and `data_report.html` are next to the shards. They are only for the reader.
"""

import dataclasses
import html
import json
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from gptjax.config.data import DataConfig
from gptjax.text.cleaning.extra import MissingLibrary
from gptjax.text.cleaning.stages import LANGUAGE_CHARACTERS, make_language_of
from gptjax.text.counts import COUNTED, UNREADABLE, leaves_out
from gptjax.text.git import PREFIX, find_repositories
from gptjax.text.packing import pack_split
from gptjax.text.remote import file_size
from gptjax.text.shards import TokenSplit, open_dataset
from gptjax.text.sources import given_files
from gptjax.text.streams import named_errors, open_raw
from gptjax.text.tokenizer import load_tokenizer

JSON_FILE, PAGE = "data_report.json", "data_report.html"
_ROWS = 200
_SAMPLED = 200
_BLOCK_SIZES = (256, 1024, 4096)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.15rem .7rem;text-align:left;"
    "vertical-align:top;border-bottom:1px solid #ddd}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}"
    "pre{white-space:pre-wrap;word-break:break-word;background:#f5f5f5;padding:.4rem;margin:.2rem 0;font-size:13px}"
    ".bar{background:#48c;height:.8rem}"
)


def write_datasheet(folder: Path, data: DataConfig, counts: Mapping[str, int], cleaning: dict[str, Any] | None) -> None:
    """Writes both files.

    Args:
        folder: Folder of the shards and the manifest.
        data: The options.
        counts: Counts of the manifest.
        cleaning: Result of `store.store_report`; None: no stage of `data.clean` was on.
    """
    sheet = make_datasheet(folder, data, counts, cleaning)
    (folder / JSON_FILE).write_text(json.dumps(sheet, indent=2) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render_page(sheet), encoding="utf-8", errors="replace")


def make_datasheet(
    folder: Path, data: DataConfig, counts: Mapping[str, int], cleaning: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the content of the datasheet as plain values; see `write_datasheet`."""
    dataset = open_dataset(folder, "header")
    defaults = dataclasses.asdict(DataConfig())
    reasons = {name: n for name, n in counts.items() if leaves_out(name) and n}
    return {
        "data_hash": dataset.hash,
        "sources": _sources(data),
        "unreadable": [name.removeprefix(UNREADABLE) for name in counts if name.startswith(UNREADABLE)],
        "options": _changed(dataclasses.asdict(data), defaults),
        "documents": {"read": counts["read"], "kept": counts["read"] - sum(reasons.values()), "left_out": reasons},
        "changed": {name: n for name, n in counts.items() if name in COUNTED and name not in reasons and n},
        "splits": {"train": _describe(dataset.train), "validation": _describe(dataset.validation)},
        "languages": _languages(folder, dataset.train) if data.clean.active else {},
        "packing": {str(size): _packing(dataset.train, size) for size in _BLOCK_SIZES},
        "stages": cleaning["stages"] if cleaning else [],
        "examples": cleaning["examples"] if cleaning else {},
    }


def render_page(sheet: dict[str, Any]) -> str:
    """Returns the page. Text of documents is escaped, because it can contain HTML and scripts."""
    documents, splits = sheet["documents"], sheet["splits"]
    reasons = [(_words(name), n) for name, n in sorted(documents["left_out"].items(), key=lambda item: -item[1])]
    sizes = [
        (name, f"{s['documents']:,}", f"{s['tokens']:,}", f"{s['bytes']:,}", f"{s['bytes_per_token']:.3f}")
        for name, s in splits.items()
    ]
    speed = [
        (
            stage["stage"],
            f"{stage['characters']:,}",
            f"{stage.get('left_out', 0):,}",
            f"{stage.get('changed', 0):,}",
            f"{stage['characters'] / 1e6 / max(1e-4, stage['cpu_seconds']):.1f}",
        )
        for stage in sheet["stages"]
    ]
    files = [(s["name"], f"{s.get('bytes', 0):,}", s.get("hash", ""), s["licence"]) for s in sheet["sources"][:_ROWS]]
    more = len(sheet["sources"]) - len(files)
    examples = "".join(
        f"<h3>{html.escape(_words(reason))}</h3>"
        + "".join(
            f"<div>{html.escape(where)}</div>" + "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
            for where, *texts in shown
        )
        for reason, shown in sheet["examples"].items()
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Data report</title>",
        f"<style>{_STYLE}</style><h1>Data report</h1><p>Data hash {sheet['data_hash']}</p>",
        "<h2>Documents</h2>",
        f"<p>{documents['read']:,} read = {documents['kept']:,} kept",
        *(f" + {n:,} {html.escape(words)}" for words, n in reasons),
        "</p>",
        _table(("Changed", "#Number"), [(_words(name), f"{n:,}") for name, n in sheet["changed"].items()]),
        _table(("Split", "#Documents", "#Tokens", "#Bytes", "#Bytes per token"), sizes),
        "<h2>Length of training documents in tokens</h2>",
        _histogram(splits["train"]["length_histogram"]),
        _table(
            (f"Language of {_SAMPLED} training documents", "#Share"),
            [(language, f"{share:.1%}") for language, share in sheet["languages"].items()],
        ),
        "<h2>Packing of training documents</h2>",
        _table(
            ("#Window in tokens", "#Windows", "#Padding with best_fit", "#Documents cut by best_fit", "#Cut by stream"),
            [
                (size, f"{p['windows']:,}", f"{p['padding']:.2%}", f"{p['cut']:.2%}", f"{p['cut_by_stream']:.2%}")
                for size, p in sheet["packing"].items()
            ],
        ),
        "<h2>Stages</h2>" if speed else "",
        _table(("Stage", "#Characters in", "#Left out", "#Changed", "#M characters per CPU second"), speed),
        "<h2>Sources</h2>",
        _table(("Source", "#Bytes", "XXH3-128 or commit", "Licence"), files),
        _table(("Files that could not be read to their end",), [(error,) for error in sheet["unreadable"][:_ROWS]]),
        f"<p>and {more:,} more, in {JSON_FILE}</p>" if more else "",
        f"<h2>Options</h2><pre>{html.escape(json.dumps(sheet['options'], indent=2))}</pre>",
        f"<h2>Examples</h2>{examples}" if examples else "",
        "</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _sources(data: DataConfig) -> list[dict[str, Any]]:
    """Each file with its size and hash. No format of text says its licence, so the user states it."""
    licence = data.license or "not stated"
    if data.source:
        return [{"name": f"{data.source} {platform.python_version()}", "licence": data.license or "PSF-2.0"}]
    if data.hf_dataset:
        return [{"name": data.hf_dataset, "licence": licence}]
    sources = []
    for path in given_files(data, Counter()):
        digest = xxhash.xxh3_128()
        with named_errors(path), open_raw(path) as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        name = str(path).encode("utf-8", "replace").decode()
        sources.append({"name": name, "bytes": file_size(path), "hash": digest.hexdigest(), "licence": licence})
    for folder, commit in find_repositories(data.path):
        sources.append({"name": f"{PREFIX}{folder}", "hash": commit, "licence": licence})
    return sources


def _describe(split: TokenSplit) -> dict[str, Any]:
    starts = split.document_starts(0, split.n_tokens)
    ends = np.append(starts[1:], split.n_tokens - (split.end_of_text is not None))
    lengths = ends - starts - (split.end_of_text is not None)
    powers = np.bincount(np.ceil(np.log2(np.maximum(1, lengths))).astype(int)) if len(lengths) else np.zeros(1, int)
    return {
        "documents": split.n_documents,
        "tokens": split.n_tokens,
        "bytes": split.n_bytes,
        "bytes_per_token": split.n_bytes / max(1, int(lengths.sum())),
        "length_histogram": {str(2**power): int(n) for power, n in enumerate(powers)},
    }


def _languages(folder: Path, split: TokenSplit) -> dict[str, float]:
    """Shares of languages among evenly spaced documents, the largest first; none: py3langid is not installed."""
    try:
        language_of = make_language_of()
    except MissingLibrary:
        return {}
    tokenizer, starts = load_tokenizer(folder / "tokenizer.json"), split.document_starts(0, split.n_tokens)
    found: Counter[str] = Counter()
    for number in range(0, len(starts), -(-len(starts) // _SAMPLED)):
        start = int(starts[number]) + (split.end_of_text is not None)
        stop = int(starts[number + 1]) if number + 1 < len(starts) else split.n_tokens
        found[language_of(tokenizer.decode(split.slice(start, min(stop, start + LANGUAGE_CHARACTERS))))] += 1
    return {language: n / found.total() for language, n in found.most_common()}


def _packing(split: TokenSplit, block_size: int) -> dict[str, Any]:
    """What `data.packing` would do at a window's length: padding, and the shares of documents that are cut."""
    packing = pack_split(split, block_size)
    starts = split.document_starts(0, split.n_tokens)
    ends = np.append(starts[1:], split.n_tokens - (split.end_of_text is not None)) - 1
    return {
        "windows": packing.n_windows,
        "padding": packing.padding_share(block_size),
        "cut": packing.n_cut / len(starts),
        "cut_by_stream": float((starts // block_size != ends // block_size).mean()),
    }


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    changed = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = _changed(value, defaults[name])
            if value:
                changed[name] = value
        elif value != defaults[name]:
            changed[name] = value
    return changed


def _words(reason: str) -> str:
    if reason.startswith("changed_"):
        return f"changed by {reason.removeprefix('changed_')}"
    return COUNTED.get(reason, reason)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table; columns whose header begins with # are numbers."""
    if not rows:
        return ""
    numeric = [' class="n"' if name.startswith("#") else "" for name in header]

    def line(tag: str, cells: tuple[str, ...]) -> str:
        return (
            "<tr>"
            + "".join(f"<{tag}{kind}>{html.escape(c)}</{tag}>" for kind, c in zip(numeric, cells, strict=True))
            + "</tr>"
        )

    head = line("th", tuple(name.lstrip("#") for name in header))
    return f"<table>{head}{''.join(line('td', row) for row in rows)}</table>"


def _histogram(counts: Mapping[str, int]) -> str:
    largest = max(1, *counts.values())
    rows = "".join(
        f'<tr><td class="n">up to {int(length):,}</td><td class="n">{n:,}</td>'
        f'<td style="width:30rem"><div class="bar" style="width:{100 * n / largest:.1f}%"></div></td></tr>'
        for length, n in counts.items()
    )
    return f"<table>{rows}</table>"
