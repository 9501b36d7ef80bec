"""Writes shards and the manifest. A file gets its final name only when it is complete."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from gptjax.errors import UserError
from gptjax.files import publish, temporary_name, write_atomic
from gptjax.text.shards import (
    FORMAT_VERSION,
    HEADER_SIZE,
    MANIFEST,
    Header,
    aligned,
    content_hash,
    open_shard,
    shard_name,
    token_dtype,
)

SHARD_TOKENS = 2**27


class CorpusChanged(Exception):
    """Finished shards contain other text than the beginning of the corpus."""


class ShardWriter:
    """Appends documents to the shards of one split, `NAME-00000.bin` and so on.

    Shards that a killed process finished in `folder` are kept. Documents that are completely in them are skipped
    (`pass_over`); only the rest of a document that continues after them is written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        vocab_size: int,
        end_of_text: int | None,
        tokenizer: str,
        shard_tokens: int = SHARD_TOKENS,
    ):
        self._folder, self._name = folder, name
        self._vocab_size, self._end_of_text, self._tokenizer = vocab_size, end_of_text, tokenizer
        self._shard_tokens = shard_tokens
        self._entries: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._take_over_finished()

    @property
    def n_tokens(self) -> int:
        """Tokens written so far."""
        return sum(entry["n_tokens"] for entry in self._entries) + (self._n_tokens if self._file else 0)

    def pass_over(self, text_hash: int) -> bool:
        """Call this for each document in order. If it returns True, finished shards contain the document: do not add
        it.

        Args:
            text_hash: Hash of the document, as for `add`.

        Raises:
            CorpusChanged: The finished shards contain other documents.
        """
        if not self._documents_left:
            return False
        self._documents_left -= 1
        self._passed = _chain(self._passed, text_hash)
        if not self._documents_left and self._passed != self._texts:
            raise CorpusChanged
        # The last document may continue after the end of the shard that it starts in.
        return self._documents_left > 0

    def add(self, documents: Sequence[np.ndarray], n_bytes: Sequence[int], text_hashes: Sequence[int]) -> None:
        """Appends documents.

        Args:
            documents: Token ids of each document, without end-of-text.
            n_bytes: UTF-8 bytes of each document.
            text_hashes: 64-bit hash of each document's text, by which a resumed preparation recognises it.

        Raises:
            ValueError: An id lies outside the vocabulary.
        """
        mark = [] if self._end_of_text is None else [np.array([self._end_of_text], np.int32)]
        sizes = [len(mark) + len(ids) for ids in documents]
        starts = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
        tokens = np.concatenate([part for ids in documents for part in (*mark, ids)])
        self._append(tokens, starts, np.array(n_bytes, np.int64), list(text_hashes))

    def close(self) -> list[dict[str, Any]]:
        """Ends the stream and returns the manifest's entry of each shard."""
        if self._end_of_text is not None and self.n_tokens:
            nothing = np.empty(0, np.int64)
            self._append(np.array([self._end_of_text], np.int32), nothing, nothing, [])
        if self._documents_left or len(self._swallow):
            raise CorpusChanged
        self._finish_shard()
        return self._entries

    def abandon(self) -> None:
        """Closes the open file without finishing its shard."""
        if self._file:
            self._file.close()
            self._file = None

    def _append(self, tokens: np.ndarray, starts: np.ndarray, n_bytes: np.ndarray, hashes: list[int]) -> None:
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise ValueError(f"ids must lie in [0, {self._vocab_size}), not {tokens.min()} to {tokens.max()}")
        tokens, starts, n_bytes, hashes = self._without_finished(tokens, starts, n_bytes, hashes)
        done = 0
        while done < len(tokens):
            file = self._file or self._open_shard()
            part = tokens[done : done + self._shard_tokens - self._n_tokens]
            first, last = np.searchsorted(starts, [done, done + len(part)])
            self._offsets.append((starts[first:last] - done + self._n_tokens).astype("<u8"))
            self._n_bytes += int(n_bytes[first:last].sum())
            self._texts = functools.reduce(_chain, hashes[first:last], self._texts)
            self._write(file, part.astype(token_dtype(self._vocab_size)).tobytes())
            self._n_tokens += len(part)
            done += len(part)
            if self._n_tokens == self._shard_tokens:
                self._finish_shard()

    def _take_over_finished(self) -> None:
        """Records the complete shards of this tokenizer, and removes all other files of this split."""
        self._swallow = np.empty(0, np.int32)
        self._texts = self._passed = bytes(16)
        while not self._entries or self._entries[-1]["n_tokens"] == self._shard_tokens:
            path = self._folder / shard_name(self._name, len(self._entries))
            try:
                header, tokens, offsets = open_shard(path, "full")
            except UserError:
                break
            if header.tokenizer != self._tokenizer or header.n_tokens > self._shard_tokens:
                break
            # Tokens from the start of the newest document to the end will be added again, and are dropped then.
            start = int(offsets[-1]) if len(offsets) else 0
            before = np.empty(0, np.int32) if len(offsets) else self._swallow
            self._swallow = np.concatenate([before, tokens[start:]], dtype=np.int32)
            self._texts = bytes.fromhex(header.texts)
            self._entries.append(_entry(path, header))
        self._documents_left = sum(entry["n_documents"] for entry in self._entries)
        kept = {entry["file"] for entry in self._entries}
        for path in (*self._folder.glob(f"{self._name}-*.bin"), *self._folder.glob(f".{self._name}-*")):
            if path.name not in kept:
                path.unlink()

    def _without_finished(self, tokens: np.ndarray, starts: np.ndarray, n_bytes: np.ndarray, hashes: list[int]):
        """Drops the leading tokens that are in finished shards, which also count their document."""
        size = min(len(tokens), len(self._swallow))
        if not size:
            return tokens, starts, n_bytes, hashes
        if not np.array_equal(tokens[:size], self._swallow[:size]):
            raise CorpusChanged
        self._swallow = self._swallow[size:]
        first = int(np.searchsorted(starts, size))
        return tokens[size:], starts[first:] - size, n_bytes[first:], hashes[first:]

    def _open_shard(self) -> BinaryIO:
        if self._entries and self._entries[-1]["n_tokens"] < self._shard_tokens:
            raise CorpusChanged  # the finished shard ended the stream
        self._path = self._folder / shard_name(self._name, len(self._entries))
        self._file = open(temporary_name(self._path), "wb")  # noqa: SIM115
        # The header is written last, so that an unfinished file never looks like a shard.
        self._file.write(bytes(HEADER_SIZE))
        self._checksum = xxhash.xxh3_128()
        self._n_tokens = self._n_bytes = 0
        self._offsets: list[np.ndarray] = []
        return self._file

    def _write(self, file: BinaryIO, raw: bytes) -> None:
        file.write(raw)
        self._checksum.update(raw)

    def _finish_shard(self) -> None:
        if not (file := self._file):
            return
        offsets = np.concatenate(self._offsets)
        size = self._n_tokens * token_dtype(self._vocab_size).itemsize
        self._write(file, bytes(aligned(size) - size))
        self._write(file, offsets.tobytes())
        header = Header(
            vocab_size=self._vocab_size,
            n_tokens=self._n_tokens,
            n_documents=len(offsets),
            n_bytes=self._n_bytes,
            checksum=self._checksum.hexdigest(),
            tokenizer=self._tokenizer,
            texts=self._texts.hex(),
        )
        file.seek(0)
        file.write(header.pack())
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        publish(temporary_name(self._path), self._path)
        self._entries.append(_entry(self._path, header))


def _chain(texts: bytes, text_hash: int) -> bytes:
    """The hash of some texts and one more."""
    return xxhash.xxh3_128_digest(texts + text_hash.to_bytes(8, "little"))


def _entry(path: Path, header: Header) -> dict[str, Any]:
    """The manifest's entry for a shard."""
    counts = {"n_tokens": header.n_tokens, "n_documents": header.n_documents, "n_bytes": header.n_bytes}
    return {"file": path.name, **counts, "checksum": header.checksum}


def write_manifest(
    folder: Path,
    shards: dict[str, list[dict[str, Any]]],
    *,
    tokenizer: str,
    vocab_size: int,
    end_of_text: int | None,
    about: dict[str, Any],
) -> None:
    """Writes the manifest, which makes the folder a dataset.

    Args:
        folder: Folder of the shards.
        shards: Results of `ShardWriter.close` for "train" and "validation".
        tokenizer: Fingerprint of the tokenizer.
        vocab_size: Vocabulary size of the tokenizer.
        end_of_text: End-of-text id of the tokenizer.
        about: Sources and processing of the data, for the reader; not included in the content hash.
    """
    splits = {
        name: {key: sum(entry[key] for entry in entries) for key in ("n_tokens", "n_documents", "n_bytes")}
        | {"shards": entries}
        for name, entries in shards.items()
    }
    content = {
        "format": "gptjax-data",
        "version": FORMAT_VERSION,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "end_of_text": end_of_text,
        "splits": splits,
    }
    manifest = {**content, "hash": content_hash(content), **about}
    write_atomic(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
