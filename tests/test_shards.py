import json
import struct

import numpy as np
import pytest
import xxhash

from gptjax.errors import UserError
from gptjax.text.shard_writer import ShardWriter, write_manifest
from gptjax.text.shards import HEADER_SIZE, open_dataset

FINGERPRINT = "ab" * 32
END = 9


def write(folder, documents, *, vocab_size=10, end_of_text: int | None = END, shard_tokens=1000, about=None):
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for name in ("train", "validation"):
        writer = ShardWriter(
            folder,
            name,
            vocab_size=vocab_size,
            end_of_text=end_of_text,
            tokenizer=FINGERPRINT,
            shard_tokens=shard_tokens,
        )
        for i in range(0, len(documents), 3):
            part = documents[i : i + 3]
            writer.add(
                [np.array(ids, np.int32) for ids in part], [2 * len(ids) for ids in part], [len(ids) for ids in part]
            )
        shards[name] = writer.close()
    write_manifest(
        folder,
        shards,
        tokenizer=FINGERPRINT,
        vocab_size=vocab_size,
        end_of_text=end_of_text,
        about=about or {},
    )
    return folder


def random_documents(n=20, vocab_size=9, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(1, 30)).tolist() for _ in range(n)]


@pytest.mark.parametrize("shard_tokens", [7, 16, 64, 1000])
@pytest.mark.parametrize("end_of_text", [END, None])
def test_stream_is_every_document_after_its_end_of_text_however_it_is_cut(tmp_path, shard_tokens, end_of_text):
    documents = random_documents(8)
    split = open_dataset(write(tmp_path, documents, end_of_text=end_of_text, shard_tokens=shard_tokens)).train
    mark = [] if end_of_text is None else [end_of_text]
    stream = [token for ids in documents for token in (*mark, *ids)] + mark
    starts = np.cumsum([0, *(len(mark) + len(ids) for ids in documents)])[:-1]
    assert split.slice(0, split.n_tokens).tolist() == stream
    assert split.slice(0, 0).dtype == np.int32 == split.slice(3, 50).dtype
    assert split.n_documents == len(documents)
    assert split.n_bytes == 2 * sum(map(len, documents))
    for start, stop in [(0, len(stream)), (5, 90), (11, 12), (40, 40), (len(stream), len(stream))]:
        assert split.slice(start, stop).tolist() == stream[start:stop]
        assert split.document_starts(start, stop).tolist() == [s for s in starts if start <= s < stop]


def test_range_outside_the_stream_is_refused(tmp_path):
    split = open_dataset(write(tmp_path, [[1, 2]])).train
    for start, stop in [(-1, 2), (0, 5), (3, 2)]:
        with pytest.raises(IndexError):
            split.slice(start, stop)
        with pytest.raises(IndexError):
            split.document_starts(start, stop)


@pytest.mark.parametrize(("vocab_size", "size"), [(2**16, 2), (2**16 + 1, 4)])
def test_tokens_take_two_bytes_while_ids_fit(tmp_path, vocab_size, size):
    ids = [[0, vocab_size - 1, 5]]
    split = open_dataset(write(tmp_path, ids, vocab_size=vocab_size, end_of_text=None)).train
    assert split.tokens[0].itemsize == size
    assert split.slice(0, 3).tolist() == ids[0]


def test_hash_is_of_the_content_alone(tmp_path):
    documents = random_documents()
    first = open_dataset(write(tmp_path / "a", documents, about={"source": "x"}))
    second = open_dataset(write(tmp_path / "b", documents, about={"source": "y"}))
    third = open_dataset(write(tmp_path / "c", documents[1:]))
    assert first.hash == second.hash != third.hash


def test_id_outside_the_vocabulary_is_never_written(tmp_path):
    for ids in ([3, 10], [-1]):
        with pytest.raises(ValueError, match=r"\[0, 10\)"):
            write(tmp_path, [ids])


def test_nothing_unfinished_looks_like_a_shard(tmp_path):
    writer = ShardWriter(tmp_path, "train", vocab_size=10, end_of_text=None, tokenizer=FINGERPRINT)
    writer.add([np.arange(5, dtype=np.int32)], [5], [0])
    assert not list(tmp_path.glob("*.bin"))
    writer.abandon()
    assert all(not path.read_bytes()[:8].strip(b"\0") for path in tmp_path.iterdir())


def test_layout_is_the_documented_one(tmp_path):
    write(tmp_path, [[1, 2, 3], [4]])
    raw = (tmp_path / "train-00000.bin").read_bytes()
    fields = struct.unpack("<8sIIQQQQ16s32s16s8s8s", raw[:128])
    assert fields[:7] == (b"GPTJAXTS", 1, 2, 10, 7, 2, 8)
    assert fields[7] == xxhash.xxh3_128_digest(raw[128:])
    assert fields[8] == bytes.fromhex(FINGERPRINT)
    first, second = (3).to_bytes(8, "little"), (1).to_bytes(8, "little")  # the texts' hashes that `write` gives
    assert fields[9] == xxhash.xxh3_128_digest(xxhash.xxh3_128_digest(bytes(16) + first) + second)
    assert fields[11] == xxhash.xxh3_64_digest(raw[:120])
    assert np.frombuffer(raw[128:142], "<u2").tolist() == [9, 1, 2, 3, 9, 4, 9]
    assert np.frombuffer(raw[144:], "<u8").tolist() == [0, 4]


def edit(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(content) or content))


def flip(at):
    def change(content):
        content[at] ^= 1

    return change


def forge_large_id(content):
    """An id outside the vocabulary with both checksums right, as a faulty writer would leave it."""
    content[HEADER_SIZE : HEADER_SIZE + 2] = (77).to_bytes(2, "little")
    content[48:64] = xxhash.xxh3_128_digest(bytes(content[HEADER_SIZE:]))
    content[120:128] = xxhash.xxh3_64_digest(bytes(content[:120]))


SHARD_FAULTS = {
    "wrong magic": (flip(0), "not a token shard"),
    "empty": (lambda content: b"\n", "not a token shard"),
    "other version": (lambda content: content[:8] + b"\7" + content[9:], "version 7"),
    "truncated header": (lambda content: content[:100], "truncated inside its header"),
    "flipped bit in the header": (flip(30), "damaged header"),
    "flipped bit in the header's checksum": (flip(125), "damaged header"),
    "truncated": (lambda content: content[:-1], "truncated"),
    "appended to": (lambda content: content + b"\0", "appended"),
    "flipped bit in a token": (flip(HEADER_SIZE + 5), "damaged"),
    "flipped bit in an offset": (flip(-1), "damaged"),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_damaged_shard_is_named(tmp_path, fault):
    change, message = SHARD_FAULTS[fault]
    write(tmp_path, random_documents(), shard_tokens=100)
    edit(tmp_path / "train-00001.bin", change)
    with pytest.raises(UserError, match=r"train-00001\.bin") as error:
        open_dataset(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_single_flipped_bit_is_found(tmp_path):
    write(tmp_path, [[1, 2, 3], [4]])
    path = tmp_path / "train-00000.bin"
    for at in range(path.stat().st_size):
        edit(path, flip(at))
        with pytest.raises(UserError):
            open_dataset(tmp_path)
        edit(path, flip(at))
    open_dataset(tmp_path)


def test_id_outside_the_vocabulary_is_found_behind_right_checksums(tmp_path):
    write(tmp_path, random_documents())
    path = tmp_path / "train-00000.bin"
    edit(path, forge_large_id)
    forged = path.read_bytes()[48:64].hex()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["checksum"] = forged
    from gptjax.text.shards import content_hash

    manifest["hash"] = content_hash(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"train-00000\.bin: holds token id 77"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, verify="header").train.slice(0, 1).tolist() == [77]


def test_missing_exchanged_or_foreign_shard_is_named(tmp_path):
    write(tmp_path, random_documents(), shard_tokens=100)
    first, second = tmp_path / "train-00000.bin", tmp_path / "train-00001.bin"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"train-00000\.bin: .* as in .*manifest\.json"):
        open_dataset(tmp_path, verify="header")
    first.unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin: cannot be read"):
        open_dataset(tmp_path)
    first.write_bytes(kept)
    open_dataset(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": "gptjax-data", "version": 9}', '{"format": "gptjax-data", "version": 1}', "x"],
)
def test_damaged_manifest_is_named(tmp_path, content):
    write(tmp_path, [[1, 2]])
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_dataset(tmp_path)


def test_edited_manifest_is_found(tmp_path):
    write(tmp_path, [[1, 2]])
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"n_bytes": 4', '"n_bytes": 5'))
    with pytest.raises(UserError, match="damaged"):
        open_dataset(tmp_path)
