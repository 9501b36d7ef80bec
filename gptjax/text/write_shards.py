"""Encodes the documents of a corpus and writes them to shards."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.text.documents import OriginWriter
from gptjax.text.formats import Document
from gptjax.text.shard_writer import SHARD_TOKENS, ShardWriter
from gptjax.text.split import Split, text_hash
from gptjax.text.tokenizer import encode_each
from gptjax.text.tokenizers.base import Tokenizer

BATCH_CHARACTERS = 2**22
REPORT_SECONDS = 5.0


def write_shards(
    folder: Path, documents: Iterable[Document], split: Split, tokenizer: Tokenizer, report: Callable[[str], object]
) -> dict[str, list[dict]]:
    """Writes the shards of both splits; continues after the shards that a killed process had finished.

    Returns:
        The manifest's entries of the shards, by split.
    """
    writers = {
        name: ShardWriter(
            folder,
            name,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            tokenizer=tokenizer.fingerprint,
            shard_tokens=SHARD_TOKENS,
        )
        for name in ("train", "validation")
    }
    if finished := sum(writer.n_tokens for writer in writers.values()):
        report(f"preparing: continues after {finished:,} tokens in finished shards")
    progress = _progress(report)
    origins = {name: OriginWriter(folder, name) for name in writers}
    try:
        for parts, ids in _encoded(_batches(documents, split, writers, origins), tokenizer):
            n_bytes = _write(writers, parts, ids)
            progress(len(parts), n_bytes, sum(writer.n_tokens for writer in writers.values()))
        return {name: writer.close() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
        for writer in origins.values():
            writer.close()


class _Part(NamedTuple):
    where: str
    split: str
    text: str
    text_hash: int


def _batches(
    documents: Iterable[Document], split: Split, writers: dict[str, ShardWriter], origins: dict[str, OriginWriter]
) -> Iterator[list[_Part]]:
    """Batches the documents that are not in finished shards yet, and records the origin of every document."""
    batch, size = [], 0
    for document in documents:
        for name, text in split(document.text):
            one = text_hash(text)
            origins[name].add(document.where, one)
            if not writers[name].pass_over(one):
                batch.append(_Part(document.where, name, text, one))
                size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(batches: Iterable[list[_Part]], tokenizer: Tokenizer) -> Iterator[tuple[list[_Part], list[np.ndarray]]]:
    """Yields each batch with its ids, while the next batch is encoded and another one is read."""
    with ThreadPoolExecutor(1) as encoder:
        waiting: deque[tuple[list[_Part], Future[list[np.ndarray]]]] = deque()
        for parts in batches:
            waiting.append((parts, encoder.submit(encode_each, tokenizer, [(part.text, part.where) for part in parts])))
            if len(waiting) > 1:
                done, ids = waiting.popleft()
                yield done, ids.result()
        for done, ids in waiting:
            yield done, ids.result()


def _write(writers: dict[str, ShardWriter], parts: list[_Part], ids: list[np.ndarray]) -> int:
    total = 0
    for name, writer in writers.items():
        mine = [i for i, part in enumerate(parts) if part.split == name]
        if mine:
            n_bytes = [_n_bytes(parts[i].text) for i in mine]
            writer.add([ids[i] for i in mine], n_bytes, [parts[i].text_hash for i in mine])
            total += sum(n_bytes)
    return total


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _progress(report: Callable[[str], object]) -> Callable[[int, int, int], None]:
    start = last = time.monotonic()
    documents = size = 0

    def advance(n_documents: int, n_bytes: int, n_tokens: int) -> None:
        nonlocal documents, size, last
        documents += n_documents
        size += n_bytes
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            last = now
            report(
                f"preparing: {documents:,} documents, {size / 1e6:,.0f} MB, {n_tokens:,} tokens,"
                f" {size / 1e6 / (now - start):.1f} MB/s"
            )

    return advance
