"""Token shards and their manifest, broken on the disk; preparations, killed."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from gptjax.config.data import DataConfig
from gptjax.errors import UserError
from gptjax.text import prepare as module
from gptjax.text import write_shards
from gptjax.text.prepare import find_folder, open_folder, prepare
from gptjax.text.shards import HEADER_SIZE, content_hash, open_shard
from tests.faults.inputs import BYTES, accepted, write_config
from tests.tiny import write_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prepared(tmp_path, capsys, monkeypatch):
    """A config, and the folder of its prepared data, in several shards."""
    monkeypatch.setattr(write_shards, "SHARD_TOKENS", 4000)
    config = write_config(tmp_path, write_corpus(tmp_path / "corpus"))
    folder = Path(accepted(capsys, "prepare", config).splitlines()[-1])
    return config, folder


def rewrite(path: Path, change) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(content) or content))


def flip_bit(content: bytearray) -> None:
    content[-1001] ^= 4


SHARD_FAULTS = {
    "truncated by one byte": lambda content: content[:-1],
    "truncated to its header": lambda content: content[:HEADER_SIZE],
    "empty": lambda content: b"\n",
    "wrong magic": lambda content: b"NOTASHRD" + content[8:],
    "one flipped bit": flip_bit,
    "4 kB of zeros": lambda content: content[:4096] + bytes(4096) + content[8192:],
}


@pytest.mark.fault(37, "a token shard: truncated, wrong magic, flipped bit, zeros", "the file is named, data made anew")
@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_damaged_shard(prepared, capsys, seen, fault):
    config, folder = prepared
    path = folder / "train-00001.bin"
    before = path.read_bytes()
    rewrite(path, SHARD_FAULTS[fault])
    output = accepted(capsys, "prepare", config)
    assert "prepared data is damaged and made anew" in output and "train-00001.bin" in output
    assert path.read_bytes() == before
    seen(f"{fault}: {output.splitlines()[0].replace(str(folder), '')}")


def forge_shard(folder: Path, token: int) -> None:
    """Puts an id into a shard and makes every checksum right again, as a faulty program would."""
    path = folder / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[HEADER_SIZE : HEADER_SIZE + 2] = token.to_bytes(2, "little")
    content[48:64] = xxhash.xxh3_128_digest(bytes(content[HEADER_SIZE:]))
    content[120:128] = xxhash.xxh3_64_digest(bytes(content[:120]))
    path.write_bytes(content)
    forge_manifest(folder, ("splits", "train", "shards", 0, "checksum"), content[48:64].hex())


def forge_manifest(folder: Path, keys: tuple, value) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(manifest | {"hash": content_hash(manifest)}))


@pytest.mark.fault(38, "a shard with an id beyond the vocabulary, checksums right", "refused: the gather would clamp")
def test_id_beyond_the_vocabulary(prepared, capsys, seen):
    config, folder = prepared
    forge_shard(folder, 257)
    with pytest.raises(UserError, match="holds token id 257, must be below the vocabulary's 257") as error:
        open_folder(folder)
    seen(str(error.value).replace(str(folder), ""))
    assert "holds token id 257" in accepted(capsys, "prepare", config), "the command makes the data anew"
    open_folder(folder)


def test_header_verification_leaves_the_content_unread(prepared, capsys):
    config, folder = prepared
    rewrite(folder / "train-00001.bin", flip_bit)
    assert "damaged" not in accepted(capsys, "prepare", config, "--data.verify", "header")
    assert "damaged" in accepted(capsys, "prepare", config, "--data.verify", "full")
    rewrite(folder / "train-00001.bin", lambda content: content[:-1])
    assert "damaged" in accepted(capsys, "prepare", config, "--data.verify", "header")


@pytest.mark.fault(43, "a shard removed, exchanged or renamed between runs", "named by the manifest, data made anew")
@pytest.mark.parametrize("fault", ["removed", "exchanged", "renamed", "put in from elsewhere"])
def test_shard_that_the_manifest_does_not_know(prepared, capsys, seen, fault):
    config, folder = prepared
    first, second = folder / "train-00000.bin", folder / "train-00001.bin"
    if fault == "removed":
        second.unlink()
    elif fault == "exchanged":
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif fault == "renamed":
        second.rename(folder / "train-00009.bin")
    else:
        second.write_bytes((folder / "train-00002.bin").read_bytes())
    for flags in ((), ("--data.verify", "header")):
        with pytest.raises(UserError, match=r"train-0000[01]\.bin"):
            open_folder(folder, "header" if flags else "full")
    output = accepted(capsys, "prepare", config)
    assert "made anew" in output and ".bin" in output
    seen(f"{fault}: {output.splitlines()[0].replace(str(folder), '')}")


@pytest.mark.fault(43, "a manifest with a right hash that names a file elsewhere, or other kinds", "refused")
@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("splits", "train", "shards", 0, "file"), "../../secret.bin"),
        (("splits", "train", "shards", 0, "file"), "/etc/passwd"),
        (("splits", "train", "shards"), []),
        (("splits", "train", "shards", 0), None),
        (("splits", "train"), 3),
        (("splits",), {}),
        (("splits", "validation", "n_bytes"), "many"),
        (("vocab_size",), -1),
        (("end_of_text",), 99999),
        (("counts",), [1]),
    ],
)
def test_forged_manifest(prepared, capsys, seen, keys, value):
    config, folder = prepared
    forge_manifest(folder, keys, value)
    with pytest.raises(UserError, match=r"manifest\.json: damaged") as error:
        open_folder(folder)
    assert "made anew" in accepted(capsys, "prepare", config)
    seen(f"{keys[-1]}={value!r}: {str(error.value).replace(str(folder), '')}")


@pytest.mark.fault(43, "a source file added, renamed or removed between runs", "another data hash, which runs compare")
def test_source_that_changed_between_runs(tmp_path, capsys, seen):
    corpus = write_corpus(tmp_path / "corpus")
    config = write_config(tmp_path, corpus)
    hashes = []
    for change in ("nothing", "renamed", "added", "removed"):
        if change == "renamed":
            (corpus / "000.txt").rename(corpus / "900.txt")
        elif change == "added":
            (corpus / "901.txt").write_text("one more")
        elif change == "removed":
            (corpus / "007.txt").unlink()
        folder = Path(accepted(capsys, "prepare", config).splitlines()[-1])
        hashes.append(open_folder(folder).dataset.hash)
    assert len(set(hashes)) == 4
    seen("renamed, added, removed: each gives another hash, which a resumed run rejects")


SCRIPT = """
import sys
from pathlib import Path
from gptjax.config.data import DataConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.text import write_shards
from gptjax.text.prepare import prepare
write_shards.SHARD_TOKENS, write_shards.BATCH_CHARACTERS = 3000, 2000
data = DataConfig(path=(sys.argv[1],))
print(prepare(data, TokenizerConfig(kind=sys.argv[3]), Path(sys.argv[2])).dataset.hash)
"""


def start(corpus: Path, cache: Path, kind: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(cache), kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def finished_shards(building: Path) -> dict[str, tuple[int, int]]:
    """Identity of every shard with a final name; each must be whole."""
    for path in building.glob("*.bin"):
        open_shard(path, "full")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in building.glob("*.bin")}


@pytest.mark.slow
@pytest.mark.fault(
    43, "preparation killed with SIGKILL at random moments", "continues after the finished shards; none half"
)
@pytest.mark.parametrize(
    ("kind", "kills"), [("bytes", 4), ("chars", 2), pytest.param("bpe", 10, marks=pytest.mark.slow)]
)
def test_killed_preparation(tmp_path, seen, kind, kills):
    corpus, rng = tmp_path / "corpus.jsonl", random.Random(0)
    texts = ["".join(rng.choices("abc déf\n", k=rng.randrange(1, 9000))) for _ in range(400)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data, cache = DataConfig(path=(str(corpus),)), tmp_path / "cache"
    folder, _ = find_folder(data, dataclasses.replace(BYTES, kind=kind), cache)
    building = folder.with_name(f"{folder.name}.tmp")
    with start(corpus, tmp_path / "unbroken", kind) as process:
        assert process.stdout
        expected = process.stdout.read().splitlines()[-1]
    before, kept = {}, 0
    for _ in range(kills):
        with start(corpus, cache, kind) as process:
            # Killed after a few more shards: at a random moment of writing, syncing or renaming.
            goal = len(before) + rng.randrange(1, 12)
            while process.poll() is None and len(list(building.glob("*.bin"))) < goal:
                time.sleep(0.0005)
            time.sleep(rng.random() / 200)
            process.send_signal(signal.SIGKILL)
        if folder.exists():
            break
        after = finished_shards(building)
        assert before.items() <= after.items(), "a finished shard was made again"
        before, kept = after, max(kept, len(before))
    assert kept >= 1, "no kill came between two shards"
    with start(corpus, cache, kind) as process:
        assert process.stdout
        output = process.stdout.read().splitlines()
    assert process.returncode == 0 and output[-1] == expected
    assert before.items() <= finished_shards(folder).items()
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    seen(f"{kind}: {kills} kills, {len(before)} shards kept to the end, content as unbroken; {output[0]}")


def test_what_a_killed_preparation_left_is_not_trusted(tmp_path, monkeypatch):
    """Other text under the same fingerprint (a streamed dataset can do that), and shards that were damaged since."""
    monkeypatch.setattr(write_shards, "SHARD_TOKENS", 500)
    monkeypatch.setattr(module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    corpus = tmp_path / "corpus.jsonl"
    rng = np.random.default_rng(0)

    def write(texts):
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        os.utime(corpus, ns=(1, 1))

    texts = ["".join(rng.choice(list("abcdefgh"), 90)) for _ in range(100)]
    data, told = DataConfig(path=(str(corpus),)), []
    changed = {
        "nothing": texts,
        "the first": [texts[1], *texts[1:]],
        "the last": [*texts[:-1], texts[0]],
        "the order": texts[::-1],
    }
    for name, others in changed.items():
        cache = tmp_path / name
        write(texts)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, BYTES, cache, report=told.append)
        [building] = (cache / "data").glob("*.tmp")
        rewrite(building / "train-00004.bin", flip_bit if name == "nothing" else bytes)
        write(others)
        told.clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, "publish", os.replace)
            again = prepare(data, BYTES, cache, report=told.append)
            whole = prepare(data, BYTES, cache / "whole", report=told.append)
        assert again.dataset.hash == whole.dataset.hash, name
        assert "continues after" in told[0]
