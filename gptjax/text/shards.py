"""The shard format, and prepared data as two memory-mapped streams of tokens.

A shard is a header of 128 bytes, tokens, zeros up to a multiple of 8, and the offsets (uint64, in tokens, in
this shard) at which documents start. Everything is little-endian. A document may continue in the next shard.
Each document is end-of-text followed by its tokens, and one end-of-text ends the stream. Without an end-of-text token,
the stream has only the tokens of the text.
"""

import dataclasses
import functools
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from gptjax.errors import UserError

MAGIC = b"GPTJAXTS"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
Verify = Literal["full", "header"]
_ENTRY_KEYS = ("n_tokens", "n_documents", "n_bytes", "checksum")

# magic, version, bytes per token, vocab_size, n_tokens, n_documents, n_bytes, payload checksum, tokenizer
# fingerprint, hash of the texts, zeros; then a checksum of all this.
_HEADER = struct.Struct("<8sIIQQQQ16s32s16s8s")
HEADER_SIZE = _HEADER.size + 8
_CHUNK = 2**20  # bytes; fits in a core's cache, which is read for the checksum and again for the largest id


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a shard."""

    vocab_size: int
    n_tokens: int
    n_documents: int
    n_bytes: int
    """UTF-8 bytes of the documents that start in the shard."""
    checksum: str
    """XXH3-128 of everything after the header."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    texts: str
    """Hash of the texts of all documents that start in this shard or in one before."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the tokens."""
        return token_dtype(self.vocab_size)

    @property
    def documents_at(self) -> int:
        """Byte offset of the document offsets in the file."""
        return HEADER_SIZE + aligned(self.n_tokens * self.dtype.itemsize)

    @property
    def file_size(self) -> int:
        """Size of the whole shard in bytes."""
        return self.documents_at + 8 * self.n_documents

    def pack(self) -> bytes:
        """The header as the first bytes of a shard."""
        raw = _HEADER.pack(
            MAGIC,
            FORMAT_VERSION,
            self.dtype.itemsize,
            self.vocab_size,
            self.n_tokens,
            self.n_documents,
            self.n_bytes,
            bytes.fromhex(self.checksum),
            bytes.fromhex(self.tokenizer),
            bytes.fromhex(self.texts),
            b"",
        )
        return raw + xxhash.xxh3_64_digest(raw)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSplit:
    """Shards, memory-mapped, as one stream of tokens."""

    tokens: tuple[np.ndarray, ...]
    """Tokens of each shard."""
    documents: tuple[np.ndarray, ...]
    """Offsets at which documents start, of each shard."""
    n_bytes: int
    """UTF-8 bytes of the text."""
    end_of_text: int | None
    """Id that starts each document; None if the tokenizer has none."""

    @property
    def n_tokens(self) -> int:
        """Tokens in the stream."""
        return int(self._bases[-1])

    @property
    def n_documents(self) -> int:
        """Documents in the stream."""
        return sum(len(offsets) for offsets in self.documents)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Returns int32 tokens of positions `start` to `stop`.

        Raises:
            IndexError: The range reaches outside the stream.
        """
        parts = [self.tokens[i][low:high] for i, low, high in self._ranges(start, stop)]
        return np.concatenate([np.empty(0, np.int32), *parts], dtype=np.int32)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Returns, ascending and as int64, the positions in `[start, stop)` at which a document starts.

        Raises:
            IndexError: The range reaches outside the stream.
        """
        parts = []
        for i, low, high in self._ranges(start, stop):
            offsets = self.documents[i]
            first, last = np.searchsorted(offsets, np.array([low, high], np.uint64))
            parts.append(offsets[first:last].astype(np.int64) + self._bases[i])
        return np.concatenate([np.empty(0, np.int64), *parts])

    def document_at(self, position: int) -> int:
        """Returns the number, in the stream from 0, of the document at a position."""
        [(shard, low, _)] = self._ranges(position, position + 1)
        before = sum(len(offsets) for offsets in self.documents[:shard])
        return before + int(np.searchsorted(self.documents[shard], np.uint64(low), side="right")) - 1

    @functools.cached_property
    def _bases(self) -> np.ndarray:
        """Position in the stream at which each shard begins, and the stream's end."""
        return np.cumsum([0, *(len(tokens) for tokens in self.tokens)], dtype=np.int64)

    def _ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The part of each shard that a range of positions covers, as (shard, low, high)."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"positions [{start}, {stop}) reach outside a stream of {self.n_tokens} tokens")
        first = int(np.searchsorted(self._bases, start, side="right")) - 1
        ranges = []
        for i in range(first, len(self.tokens)):
            base, size = int(self._bases[i]), len(self.tokens[i])
            if base >= stop:
                break
            ranges.append((i, max(0, start - base), min(size, stop - base)))
        return ranges


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Prepared data: two streams, and the manifest that describes them."""

    train: TokenSplit
    validation: TokenSplit
    manifest: dict[str, Any]

    @property
    def hash(self) -> str:
        """Hash of the content: equal for equal tokens in equal order, wherever they are stored."""
        return self.manifest["hash"]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that can store every id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def open_dataset(folder: Path, verify: Verify = "full") -> Dataset:
    """Opens prepared data.

    Args:
        folder: Folder of `manifest.json` and the shards.
        verify: "header" checks the manifest, and each shard's header and size. "full" also reads every shard, and
            checks its checksum, that every id is in the vocabulary, and that document offsets increase.

    Raises:
        UserError: Something is missing, damaged, or does not belong together; the message names the file.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    splits = {}
    for name, split in manifest["splits"].items():
        opened = [_open_shard(folder / entry["file"], entry, manifest, verify) for entry in split["shards"]]
        splits[name] = TokenSplit(
            tokens=tuple(tokens for tokens, _ in opened),
            documents=tuple(documents for _, documents in opened),
            n_bytes=split["n_bytes"],
            end_of_text=manifest["end_of_text"],
        )
    return Dataset(train=splits["train"], validation=splits["validation"], manifest=manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as prepared data: {' '.join(str(error).split())}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "gptjax-data":
        raise UserError(f"{path}: not the manifest of prepared data")
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: version {manifest.get('version')!r}, this gptjax reads {FORMAT_VERSION}; prepare the data again"
        )
    if "hash" not in manifest or manifest["hash"] != content_hash(manifest):
        raise UserError(f"{path}: damaged: its content does not have the hash that it states")
    if wrong := _wrong_in_manifest(manifest):
        raise UserError(f"{path}: damaged: {wrong}")
    return manifest


def _wrong_in_manifest(manifest: dict[str, Any]) -> str:
    """The first violation of the manifest's format; empty if it is valid. It is checked although the hash is correct,
    because anybody can write a manifest with a correct hash.
    """
    size, end, splits = manifest["vocab_size"], manifest["end_of_text"], manifest["splits"]
    if not _is_count(size) or not (end is None or (_is_count(end) and end < size)):
        return "vocab_size and end_of_text must be whole numbers, the second one below the first or null"
    if not isinstance(splits, dict) or set(splits) != {"train", "validation"}:
        return "splits must be train and validation"
    for name, split in splits.items():
        entries = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            return f"splits.{name}.shards must be a list of shards"
        # Names are what the writer gives, so no shard can be read from another folder.
        if [entry.get("file") for entry in entries] != [shard_name(name, i) for i in range(len(entries))]:
            return f"splits.{name}.shards must be {shard_name(name, 0)} and so on"
        for key in ("n_tokens", "n_documents", "n_bytes"):
            numbers = [entry.get(key) for entry in entries]
            if not all(map(_is_count, numbers)) or split.get(key) != sum(numbers):
                return f"splits.{name}.{key} must be the sum of its shards'"
    counts = manifest.get("counts", {})
    if not isinstance(counts, dict) or not all(map(_is_count, counts.values())):
        return "counts must be whole numbers"
    return ""


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:05d}.bin"


def content_hash(manifest: dict[str, Any]) -> str:
    """Hash of everything that determines the tokens, without their origin, time and place of storage."""
    keys = ("format", "version", "tokenizer", "vocab_size", "end_of_text", "splits")
    content = {key: manifest.get(key) for key in keys}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _open_shard(
    path: Path, entry: dict[str, Any], manifest: dict[str, Any], verify: Verify
) -> tuple[np.ndarray, np.ndarray]:
    header, tokens, documents = open_shard(path, verify)
    if header.tokenizer != manifest["tokenizer"] or header.vocab_size != manifest["vocab_size"]:
        raise UserError(f"{path}: written with another tokenizer than {path.with_name(MANIFEST)} names")
    for key in _ENTRY_KEYS:
        if getattr(header, key) != entry.get(key):
            raise UserError(
                f"{path}: {key} is {getattr(header, key)}, must be {entry.get(key)} as in {path.with_name(MANIFEST)}"
            )
    return tokens, documents


def open_shard(path: Path, verify: Verify) -> tuple[Header, np.ndarray, np.ndarray]:
    """Maps one shard into memory.

    Returns:
        `(header, tokens, offsets at which documents start)`.

    Raises:
        UserError: Missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_SIZE)
            size = os.fstat(file.fileno()).st_size
        header = _unpack(raw, path)
        if size != header.file_size:
            raise UserError(f"{path}: has {size} bytes, must have {header.file_size}: truncated or appended to")
        whole = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    tokens = whole[HEADER_SIZE:][: header.n_tokens * header.dtype.itemsize].view(header.dtype)
    documents = whole[header.documents_at :].view("<u8")
    if verify == "full":
        _verify_payload(path, header, whole[HEADER_SIZE:], tokens, documents)
    return header, tokens, documents


def _unpack(raw: bytes, path: Path) -> Header:
    if raw[:8] != MAGIC:
        raise UserError(f"{path}: not a token shard: begins with {raw[:8]!r}, must begin with {MAGIC!r}")
    if len(raw) < HEADER_SIZE:
        raise UserError(f"{path}: truncated inside its header")
    version = int.from_bytes(raw[8:12], "little")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: version {version}, this gptjax reads {FORMAT_VERSION}; prepare the data again")
    if xxhash.xxh3_64_digest(raw[: _HEADER.size]) != raw[_HEADER.size :]:
        raise UserError(f"{path}: damaged header: its checksum does not match")
    _, _, itemsize, vocab_size, n_tokens, n_documents, n_bytes, checksum, tokenizer, texts, _ = _HEADER.unpack(
        raw[: _HEADER.size]
    )
    header = Header(vocab_size, n_tokens, n_documents, n_bytes, checksum.hex(), tokenizer.hex(), texts.hex())
    if itemsize != header.dtype.itemsize:
        raise UserError(f"{path}: {itemsize} bytes a token do not fit a vocabulary of {vocab_size}")
    return header


def _verify_payload(path: Path, header: Header, payload: np.ndarray, tokens: np.ndarray, documents: np.ndarray) -> None:
    checksum, largest, n_bytes = xxhash.xxh3_128(), 0, tokens.nbytes
    for start in range(0, len(payload), _CHUNK):
        part = payload[start : start + _CHUNK]
        checksum.update(part.data)
        ids = part[: max(0, n_bytes - start)].view(tokens.dtype)
        largest = max(largest, int(ids.max(initial=0)))
    if checksum.hexdigest() != header.checksum:
        raise UserError(f"{path}: damaged: the checksum of its content does not match its header")
    # An embedding lookup silently clips ids outside the vocabulary, so they must be detected here.
    if largest >= header.vocab_size:
        raise UserError(f"{path}: holds token id {largest}, must be below the vocabulary's {header.vocab_size}")
    if len(documents) and (np.any(documents[1:] <= documents[:-1]) or documents[-1] >= header.n_tokens):
        raise UserError(f"{path}: document offsets must ascend below {header.n_tokens}")


def aligned(size: int) -> int:
    """The next multiple of 8."""
    return -(-size // 8) * 8
