"""A part of the cleaned corpus: documents in one compressed file, with counts of the removed documents.

`part-00000.jsonl.zst` has a line of JSON about the part, then a line `[text, where]` for each document that is kept.
`part-00000.npy` has the MinHash signatures of these documents.
"""

import io
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.text.cleaning.near import N_HASHES, signature
from gptjax.text.cleaning.stages import Stage
from gptjax.text.formats import Document

EXAMPLES = 3
"""Number of example documents for each reason in a part."""
_SHOWN = 300


def part_path(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"part-{number:05d}.jsonl.zst"


def documents_hash(documents: Iterable[Document]) -> str:
    """Hash of the documents of a part before cleaning."""
    digest = xxhash.xxh3_128()
    for text, where in documents:
        for value in (text, where):
            digest.update(value.encode("utf-8", "surrogateescape") + b"\xff")
    return digest.hexdigest()


def clean_part(
    path: Path,
    documents: Sequence[Document],
    stages: Sequence[Stage],
    with_signatures: bool,
) -> None:
    """Cleans documents and writes the part atomically.

    Args:
        path: Result of `part_path`.
        documents: In the order of the corpus.
        stages: Result of `make_stages`.
        with_signatures: Whether to compute signatures for near duplicates.

    Raises:
        UserError: A stage fails on a document; the message names the document.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, list[list[str]]] = {}
    about: list[dict[str, Any]] = []
    kept = list(documents)
    for stage in stages:
        start, characters, changed, after = time.thread_time(), sum(len(d.text) for d in kept), 0, []
        for document in kept:
            try:
                text, reason = stage.apply(document.text, counts)
            except UserError as error:
                raise UserError(f"{document.where}: {error}") from None
            if reason:
                counts[reason] += 1
                if len(shown := examples.setdefault(reason, [])) < EXAMPLES:
                    shown.append([document.where, text[:_SHOWN]])
            else:
                if text != document.text:
                    changed += 1
                    if len(shown := examples.setdefault(f"changed_{stage.name}", [])) < EXAMPLES:
                        shown.append([document.where, *_difference(document.text, text)])
                after.append(Document(text, document.where))
        about.append(
            {
                "stage": stage.name,
                "documents": len(kept),
                "characters": characters,
                "left_out": len(kept) - len(after),
                "changed": changed,
                "characters_after": sum(len(d.text) for d in after),
                "cpu_seconds": round(time.thread_time() - start, 4),
            }
        )
        kept = after
    if with_signatures:
        start = time.thread_time()
        rows = [signature(document.text) for document in kept]
        write_atomic(path.with_suffix("").with_suffix(".npy"), _npy(np.array(rows, np.uint32).reshape(-1, N_HASHES)))
        seconds = round(time.thread_time() - start, 4)
        about.append({"stage": "signatures", "characters": sum(len(d.text) for d in kept), "cpu_seconds": seconds})
    header = {
        "input": documents_hash(documents),
        "n_in": len(documents),
        "n_out": len(kept),
        "bytes_in": sum(len(d.text.encode()) for d in documents),
        "counts": dict(counts),
        "stages": about,
        "examples": examples,
    }
    assert header["n_in"] == header["n_out"] + sum(stage.get("left_out", 0) for stage in about)
    lines = [json.dumps(header), *(json.dumps([text, where]) for text, where in kept)]
    write_atomic(
        path, zstandard.ZstdCompressor(level=1, write_checksum=True).compress(("\n".join(lines) + "\n").encode())
    )


def read_header(path: Path) -> dict[str, Any] | None:
    """The header that `clean_part` wrote; None if the part is missing or damaged."""
    try:
        return json.loads(_lines(path)[0])
    except (OSError, ValueError, zstandard.ZstdError):
        return None


def read_part(path: Path) -> tuple[dict[str, Any], Iterator[Document]]:
    """Returns the header that `clean_part` wrote, and the documents that were kept.

    Raises:
        UserError: The part is missing or damaged.
    """
    try:
        header, *lines = _lines(path)
    except (OSError, ValueError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or missing ({error}); delete its folder to clean the text again") from None
    return json.loads(header), (Document(*json.loads(line)) for line in lines)


def _lines(path: Path) -> list[bytes]:
    """The lines of a part. The zstd frame has a checksum."""
    return zstandard.ZstdDecompressor().decompress(path.read_bytes()).splitlines()


def _difference(before: str, after: str) -> list[str]:
    """Both texts from shortly before the first character that differs."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, same - 40)
    return [before[start : start + _SHOWN], after[start : start + _SHOWN]]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
