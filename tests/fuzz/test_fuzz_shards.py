"""Shards and manifests: what is opened is what was written, or it is refused by name."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import xxhash
from hypothesis import strategies as st

from gptjax.config.data import DataConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.text import write_shards
from gptjax.text.prepare import open_folder, prepare
from gptjax.text.shards import HEADER_SIZE, content_hash
from tests.fuzz.fuzz import EDITS, ODD_VALUE, ends_well, fuzz, mutate


@functools.cache
def written() -> tuple[Path, dict[str, bytes]]:
    """A folder of prepared data in several shards, and its files."""
    root = Path(tempfile.mkdtemp(prefix="gptjax-fuzz-"))
    (root / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}" * (i % 9)}) + "\n" for i in range(99)))
    shard_tokens, write_shards.SHARD_TOKENS = write_shards.SHARD_TOKENS, 1000
    try:
        data = DataConfig(path=(str(root / "a.jsonl"),))
        folder = prepare(data, TokenizerConfig(kind="bytes"), root / "cache", report=lambda _: None).folder
    finally:
        write_shards.SHARD_TOKENS = shard_tokens
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@functools.cache
def content() -> tuple:
    folder, files = written()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return tokens_of(folder, "full")


def tokens_of(folder: Path, verify) -> tuple:
    dataset = open_folder(folder, verify).dataset
    splits = (dataset.train, dataset.validation)
    return tuple(
        (
            split.slice(0, split.n_tokens).tobytes(),
            split.document_starts(0, split.n_tokens).tobytes(),
            split.end_of_text,
        )
        for split in splits
    )


def open_with(name: str, changed: bytes, *, may_differ: bool = False) -> None:
    """Opens the folder with one file changed: it must be refused by name, or hold exactly what was written."""
    expected, (folder, files) = content(), written()
    (folder / name).write_bytes(changed)
    try:
        for verify in ("full", "header"):
            found = tokens_of(folder, verify)
            assert may_differ or verify == "header" or found == expected
    except UserError as error:
        ends_well(error)
        assert str(folder) in str(error)
    finally:
        (folder / name).write_bytes(files[name])


@fuzz(200, st.sampled_from(["train-00000.bin", "validation-00000.bin"]), EDITS)
def test_mutated_shards(name, edits):
    open_with(name, mutate(written()[1][name], edits))


@fuzz(200, EDITS, st.booleans())
def test_mutated_headers_with_right_checksums(edits, of_the_payload):
    raw = written()[1]["train-00000.bin"]
    header = bytearray(mutate(raw[:120], edits)[:120].ljust(120, b"\0"))
    payload = raw[HEADER_SIZE:]
    if of_the_payload:
        payload = mutate(payload, edits)
        header[48:64] = xxhash.xxh3_128_digest(payload)
    open_with("train-00000.bin", bytes(header) + xxhash.xxh3_64_digest(bytes(header)) + payload)


@fuzz(150, EDITS)
def test_mutated_manifests(edits):
    open_with("manifest.json", mutate(written()[1]["manifest.json"], edits))


@fuzz(200, ODD_VALUE, st.data())
def test_manifests_with_odd_values_and_a_right_hash(value, data):
    manifest = json.loads(written()[1]["manifest.json"])
    place = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    manifest["hash"] = content_hash(manifest)
    # A number that no shard repeats (end_of_text, the sums' own parts) is found by what else knows it, or harmless.
    open_with("manifest.json", json.dumps(manifest).encode())


@fuzz(60, ODD_VALUE)
def test_any_json_as_a_manifest(value):
    open_with("manifest.json", json.dumps(value).encode())


def test_the_scratch_folder_goes():
    shutil.rmtree(written()[0].parents[2])
    written.cache_clear()
    content.cache_clear()
