"""The cleaned corpus on disk: parts that several processes clean, and the duplicates among all of them."""

import dataclasses
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from gptjax.config.data import DataConfig
from gptjax.files import write_atomic
from gptjax.text.cleaning.near import find_near_duplicates
from gptjax.text.cleaning.part import documents_hash, part_path, read_header, read_part
from gptjax.text.cleaning.pool import Task, open_pool
from gptjax.text.cleaning.substrings import find_repeated, without_repeated
from gptjax.text.formats import NAMED_ENDINGS, Document, batch_documents
from gptjax.text.remote import file_size
from gptjax.text.sources import given_files
from gptjax.text.streams import COMPRESSIONS

PART_CHARACTERS = 2**22
"""Characters of a part. Parts depend only on the documents, so that every process splits the corpus in the same way."""
CLEAN_VERSION = 1
"""Version of the stages; if it changes, the corpus is cleaned again."""
SHORTEST_PART = 20
"""Lines and paragraphs of fewer characters are kept even if they are repeated: brackets, headings, greetings."""
_COMPLETE = "complete.json"
_NEAR, _REPEATED = "near.npy", "repeated.npy"
_REPORT_SECONDS = 5.0

Report = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Share:
    """The parts that one of several independent processes cleans: those whose number modulo `count` is `index`."""

    index: int
    count: int


ALL_PARTS = Share(0, 1)


def build_store(
    folder: Path,
    data: DataConfig,
    read: Callable[[Counter[str]], Iterable[Document]],
    report: Report,
    share: Share = ALL_PARTS,
) -> bool:
    """Cleans the corpus into `folder`. Existing parts of the same documents are kept.

    Args:
        folder: Of this corpus and these options alone.
        data: The options.
        read: Reads the documents of the corpus in their order, and counts what the reader leaves out.
        report: Gets lines of progress.
        share: The parts to clean; another process cleans the others.

    Returns:
        Whether the store is complete: with a share, the parts of others may be missing.

    Raises:
        UserError: A document cannot be read or cleaned.
    """
    if (folder / _COMPLETE).exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    n_parts = missing = 0
    progress = _Progress(report, _expected_characters(data))
    with open_pool(data) as clean:
        waiting: deque[Task] = deque()
        for number, documents in enumerate(batch_documents(read(counts), PART_CHARACTERS)):
            n_parts = number + 1
            path = part_path(folder, number)
            header = read_header(path)
            if header is not None and header["input"] == documents_hash(documents):
                progress.skip(documents)
                continue
            if number % share.count != share.index:
                missing += 1
                continue
            waiting.append(clean.submit(path, documents))
            progress.add(documents)
            while len(waiting) > clean.size:  # bounds the documents in memory
                waiting.popleft().result()
        for future in waiting:
            future.result()
    progress.end()
    if missing:
        done = f"share {share.index + 1} of {share.count} is done"
        report(f"cleaning: {done}; {missing} of {n_parts} parts are still missing")
        return False
    for extra in folder.glob("part-*"):  # of a longer corpus
        if int(extra.name[5:].partition(".")[0]) >= n_parts:
            extra.unlink()
    start = time.perf_counter()
    if data.clean.near_duplicates:
        _write_near_duplicates(folder, n_parts, data.clean.near_duplicates)
    if data.clean.duplicate_substrings:
        texts = lambda: (one.text for one in _without_duplicates(folder, n_parts, data, Counter()))  # noqa: E731
        _save(folder / _REPEATED, find_repeated(texts, data.clean.duplicate_substrings))
    about = {"n_parts": n_parts, "counts": dict(counts), "near_seconds": round(time.perf_counter() - start, 3)}
    write_atomic(folder / _COMPLETE, json.dumps(about).encode())
    return True


def read_store(folder: Path, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    """Yields the documents of a complete store, without duplicates and repeated text.

    Args:
        folder: As `build_store` made it.
        data: The options.
        counts: Gets what the reader and the stages counted, and "duplicate", "near_duplicate", "repeated_parts" (lines
            or paragraphs that were removed), "repeated_characters", "empty" and "short" (of what was left).
    """
    about = json.loads((folder / _COMPLETE).read_text())
    counts.update(about["counts"])
    documents = _without_duplicates(folder, about["n_parts"], data, counts)
    length, start = data.clean.duplicate_substrings, 0
    if not length:
        yield from documents
        return
    repeated = np.load(folder / _REPEATED)
    for document in documents:
        text = without_repeated(document.text, start, repeated, length)
        start += len(document.text)
        counts["repeated_characters"] += len(document.text) - len(text)
        if reason := _too_short(text, data):
            counts[reason] += 1
        else:
            yield Document(text, document.where)


def _without_duplicates(folder: Path, n_parts: int, data: DataConfig, counts: Counter[str]) -> Iterator[Document]:
    near = np.load(folder / _NEAR) if data.clean.near_duplicates else None
    seen_documents: set[bytes] = set()
    seen_parts: set[int] = set()
    index = -1
    for number in range(n_parts):
        header, documents = read_part(part_path(folder, number))
        counts.update(header["counts"])
        for document in documents:
            index += 1
            text = document.text
            if data.drop_duplicates:
                digest = xxhash.xxh3_128_digest(text.encode())
                if digest in seen_documents:
                    counts["duplicate"] += 1
                    continue
                seen_documents.add(digest)
            if near is not None and near[index]:
                counts["near_duplicate"] += 1
                continue
            if data.clean.duplicate_parts != "keep":
                separator = "\n" if data.clean.duplicate_parts == "lines" else "\n\n"
                text = _without_seen(text, separator, seen_parts, counts)
                if reason := _too_short(text, data):
                    counts[reason] += 1
                    continue
            yield Document(text, document.where)


def _too_short(text: str, data: DataConfig) -> str:
    """The reason to leave out what is left of a document; empty: it stays."""
    return "empty" if not text.strip() else "short" if len(text) < data.min_characters else ""


def store_report(folder: Path) -> dict[str, Any]:
    """Results of the stages, summed over all parts: counts, stages, and the first examples of each reason."""
    about = json.loads((folder / _COMPLETE).read_text())
    stages: dict[str, Counter[str]] = {}
    examples: dict[str, list[list[str]]] = {}
    total: Counter[str] = Counter()
    for number in range(about["n_parts"]):
        header, _ = read_part(part_path(folder, number))
        total.update({key: header[key] for key in ("n_in", "n_out", "bytes_in")})
        for stage in header["stages"]:
            stages.setdefault(stage["stage"], Counter()).update({k: v for k, v in stage.items() if k != "stage"})
        for reason, shown in header["examples"].items():
            examples[reason] = (examples.get(reason, []) + shown)[:3]
    rows = [{"stage": name, **counter} for name, counter in stages.items()]
    return {"total": dict(total), "stages": rows, "examples": examples, "near_seconds": about["near_seconds"]}


def _without_seen(text: str, separator: str, seen: set[int], counts: Counter[str]) -> str:
    kept = []
    for piece in text.split(separator):
        stripped = piece.strip()
        if len(stripped) >= SHORTEST_PART:
            known = xxhash.xxh3_64_intdigest(stripped.encode())
            if known in seen:
                counts["repeated_parts"] += 1
                continue
            seen.add(known)
        kept.append(piece)
    return separator.join(kept)


def _write_near_duplicates(folder: Path, n_parts: int, threshold: float) -> None:
    files = [part_path(folder, number).with_suffix("").with_suffix(".npy") for number in range(n_parts)]
    _save(folder / _NEAR, find_near_duplicates(np.concatenate([np.load(file) for file in files]), threshold))


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.tmp.npy")
    np.save(temporary, array)
    os.replace(temporary, path)


def _expected_characters(data: DataConfig) -> int:
    """About as many as there are bytes to read; 0: unknown, because files are compressed or a part is read."""
    if not data.path or data.max_documents:
        return 0
    files = given_files(data, Counter())
    if any(path.suffix.lower() in (*COMPRESSIONS, ".parquet", *NAMED_ENDINGS) for path in files):
        return 0
    return sum(map(file_size, files))


class _Progress:
    """Prints documents, characters per second and, where the size of the corpus is known, about the time left."""

    def __init__(self, report: Report, expected: int):
        self._report, self._expected = report, expected
        self._start = self._last = time.monotonic()
        self._documents = self._characters = self._kept = self._kept_characters = 0

    def add(self, documents: list[Document]) -> None:
        self._documents += len(documents)
        self._characters += sum(len(document.text) for document in documents)
        now = time.monotonic()
        if now - self._last >= _REPORT_SECONDS:
            self._last = now
            left = max(0, self._expected - self._characters - self._kept_characters)
            self._print(f", about {left / self._speed:,.0f} s left" if self._expected else "")

    def skip(self, documents: list[Document]) -> None:
        self._kept += len(documents)
        self._kept_characters += sum(len(document.text) for document in documents)

    def end(self) -> None:
        self._print(f", {self._kept:,} documents were cleaned before" if self._kept else "")

    @property
    def _speed(self) -> float:
        return self._characters / max(1e-3, time.monotonic() - self._start)

    def _print(self, more: str) -> None:
        characters = f"{self._characters / 1e6:,.0f} M characters, {self._speed / 1e6:.1f} M/s"
        self._report(f"cleaning: {self._documents:,} documents, {characters}{more}")
