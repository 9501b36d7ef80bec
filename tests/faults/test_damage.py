"""Checkpoints with damaged, missing or foreign files."""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptjax.checkpoints.checkpoint import Checkpoints
from gptjax.checkpoints.choice import choose
from gptjax.checkpoints.manifest import MANIFEST, DamagedError, read_manifest, verify
from gptjax.checkpoints.run_dir import load_run
from gptjax.errors import UserError
from gptjax.training import trainer
from tests.faults.runs import checkpoints
from tests.tiny import assert_trees_equal, final_state, replace, rows, run_config, write_corpus

NEWEST, OLDER = 6, 4
GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_format_1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("trained"), train={"eval_every": 0})
    assert trainer.train(config) == 0
    return config


@pytest.fixture
def config(trained, tmp_path):
    """A copy of the run, to be damaged."""
    shutil.copytree(trained.run_dir, tmp_path / "run")
    return replace(trained, run_dir=str(tmp_path / "run"))


def folder(config, step: int = NEWEST) -> Path:
    return Path(config.run_dir) / "checkpoints" / f"{step:08}"


def largest(config) -> Path:
    files = [path for path in folder(config).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def overwrite(path: Path, at: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def cut(config):
    os.truncate(largest(config), largest(config).stat().st_size // 2)


def flip(config):
    path = largest(config)
    middle = path.stat().st_size // 2
    overwrite(path, middle, bytes([path.read_bytes()[middle] ^ 1]))


def zero(config):
    overwrite(largest(config), 4096, bytes(4096))


def delete(config):
    largest(config).unlink()


def cut_metadata(config):
    path = largest(config).parent / ".zarray"
    os.truncate(path, path.stat().st_size // 2)


def delete_metadata(config):
    (folder(config) / "params" / "_METADATA").unlink()


def empty(config):
    shutil.rmtree(folder(config))
    folder(config).mkdir()


def no_manifest(config):
    (folder(config) / MANIFEST).unlink()


def flip_manifest(config):
    text = (folder(config) / MANIFEST).read_text()
    (folder(config) / MANIFEST).write_text(text.replace('"step": 6', '"step": 7'))


def cut_manifest(config):
    os.truncate(folder(config) / MANIFEST, 100)


def is_file(config):
    shutil.rmtree(folder(config))
    folder(config).write_text("not a folder")


FALL_BACK = "rejected with name and reason; the newest good checkpoint is used; an error if strict"


def fault(number, what, damage, reason):
    return pytest.param(damage, reason, marks=pytest.mark.fault(number, what, FALL_BACK), id=damage.__name__)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        fault(2, "kill -9 between the commit and the manifest", no_manifest, "has no manifest.json"),
        fault(9, "an array file is cut to half", cut, "bytes, must have"),
        fault(10, "one bit of an array file is flipped", flip, "does not match its checksum"),
        fault(11, "4 kB of an array file are zeroed", zero, "does not match its checksum"),
        fault(12, "an array file is deleted", delete, "is missing"),
        fault(13, "an array's .zarray is cut short", cut_metadata, ".zarray has"),
        fault(13, "one digit of our manifest is changed", flip_manifest, "does not match its own checksum"),
        fault(13, "our manifest is cut short", cut_manifest, "manifest.json is damaged"),
        fault(14, "_METADATA is deleted", delete_metadata, "_METADATA is missing"),
        fault(15, "an empty folder has the newest step's name", empty, "has no manifest.json"),
        fault(17, "a file has the newest step's name", is_file, "is not a folder"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(config, damage, reason, seen):
    damage(config)
    before = {path: path.read_bytes() for path in folder(config).rglob("*") if path.is_file()}
    said = []
    run = load_run(Path(config.run_dir), "latest", notify=said.append)
    assert run.step == OLDER
    assert len(said) == 2 and str(folder(config)) in said[0] and reason in said[0]
    with pytest.raises(UserError, match=reason) as refused:
        load_run(Path(config.run_dir), "latest", strict=True)
    assert "\n" not in str(refused.value)
    after = {path: path.read_bytes() for path in folder(config).rglob("*") if path.is_file()}
    assert after == before, "readers change nothing"
    seen(f"{said[0].removeprefix(str(Path(config.run_dir)) + '/')}; {said[1]}")


@pytest.mark.fault(10, "training resumes after a flipped bit", "from the older step; the damaged folder is renamed")
def test_training_goes_on_from_the_newest_good_checkpoint(config, trained, capsys, seen):
    flip(config)
    damaged = largest(config).read_bytes()
    with pytest.raises(UserError, match="does not match its checksum"):
        trainer.train(replace(config, train={"strict_checkpoints": True}))
    assert trainer.train(config) == 0
    printed = capsys.readouterr().out
    assert f"resuming from step {OLDER}" in printed and "set aside as 00000006.rejected" in printed
    assert damaged in [p.read_bytes() for p in folder(config).with_suffix(".rejected").rglob("*") if p.is_file()]
    (state, _), (expected, _) = final_state(config), final_state(trained)
    assert_trees_equal(state, expected)
    assert rows(config) == rows(trained)
    seen(f"resumed from step {OLDER}; 00000006.rejected is kept; the final state equals an uninterrupted run")


@pytest.mark.fault(
    12, "every checkpoint is damaged", "training stops with an error; nothing is deleted or started from zero"
)
def test_a_run_without_a_good_checkpoint_does_not_begin_anew(config, seen):
    for step in (2, 4, 6):
        next(folder(config, step).rglob("params/*/0*")).unlink()
    before = checkpoints(config)
    with pytest.raises(UserError, match="none of its 3 checkpoints verifies") as error:
        trainer.train(config)
    assert checkpoints(config) == before
    seen(str(error.value).removeprefix(str(Path(config.run_dir))))


@pytest.mark.fault(
    2, "kill -9 before the first manifest", "the run starts from the beginning; the unfinished folder is renamed"
)
def test_a_run_killed_in_its_first_save_begins_anew(config, trained, capsys, seen):
    no_manifest(config)
    for step in (2, 4):
        shutil.rmtree(folder(config, step))
    assert trainer.train(config) == 0
    assert "set aside as 00000006.rejected" in capsys.readouterr().out
    assert_trees_equal(final_state(config)[0], final_state(trained)[0])
    seen("started from the beginning; 00000006.rejected is kept")


@pytest.mark.fault(
    16, "a stray *.orbax-checkpoint-tmp", "other commands ignore it; the next training removes it with a message"
)
def test_what_an_interrupted_save_left_is_removed(config, capsys, seen):
    stray = folder(config).with_name("00000008.orbax-checkpoint-tmp")
    shutil.copytree(folder(config), stray)
    assert load_run(Path(config.run_dir), "latest").step == NEWEST and stray.exists()
    shutil.rmtree(folder(config))
    assert trainer.train(config) == 0
    assert not stray.exists() and folder(config).exists()
    assert "removed the remains of an interrupted save" in capsys.readouterr().out
    seen("00000008.orbax-checkpoint-tmp: removed the remains of an interrupted save")


@pytest.mark.fault(17, 'files named "7" and "latest" among the checkpoints', "reported, skipped, kept")
def test_strange_names_are_passed_over(config, seen):
    for name in ("7", "latest"):
        folder(config).with_name(name).write_text("what?")
    said = []
    assert load_run(Path(config.run_dir), "latest", notify=said.append).step == NEWEST
    assert [line.split("/")[-1] for line in said] == [
        "7: rejected: its name is not that of a checkpoint",
        "latest: rejected: its name is not that of a checkpoint",
        "using 00000006 instead",
    ]
    shutil.rmtree(folder(config))
    assert trainer.train(config) == 0
    assert {"7", "latest"} <= set(checkpoints(config))
    seen("; ".join(line.split("/")[-1] for line in said[:2]))


@pytest.mark.fault(24, "a step is saved that exists already", "an error; the existing one is not changed")
def test_a_checkpoint_is_never_written_over(config, seen):
    state, meta = final_state(config)
    before = (folder(config) / MANIFEST).read_bytes()
    writer = Checkpoints(Path(config.run_dir))
    with pytest.raises(FileExistsError, match="a checkpoint is never overwritten") as error:
        writer.save(state, meta, None)
    writer.close()
    assert (folder(config) / MANIFEST).read_bytes() == before
    verify(folder(config))
    seen(str(error.value).split("/")[-1])


@pytest.mark.fault(24, "newer steps are moved away, an older one is trained on", "it resumes and saves them again")
def test_an_older_step_is_trained_on_again(config, trained, seen):
    folder(config).rename(folder(config).with_name("moved"))
    (folder(config).with_name("moved")).rename(Path(config.run_dir) / "moved")
    assert trainer.train(config) == 0
    assert_trees_equal(final_state(config)[0], final_state(trained)[0])
    seen("resumed from step 4, saved step 6 again with the same bits")


@pytest.mark.fault(25, "a checkpoint of a newer format", "rejected with both versions; no older one is used instead")
def test_a_newer_format_is_named(config, seen):
    content = json.loads((folder(config) / MANIFEST).read_text()) | {"version": 2, "gptjax": "9.1.0"}
    (folder(config) / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"written by gptjax 9.1.0 in format 2; this is gptjax .* up to format 1") as e:
        load_run(Path(config.run_dir), "latest")
    with pytest.raises(UserError, match="use the newer one"):
        trainer.train(config)
    seen(str(e.value).split("/")[-1])


@pytest.mark.fault(26, "a checkpoint of format 1, kept since it was written", "loads, and training resumes from it")
def test_the_golden_checkpoint_still_loads(tmp_path, seen):
    shutil.copytree(GOLDEN, tmp_path / "golden")
    loaded = load_run(tmp_path / "golden", "latest", strict=True)
    expected = json.loads((GOLDEN / "sums.json").read_text())
    sums = {name: float(abs(leaf).sum()) for name, leaf in loaded.params["embed"].items()}
    assert sums == pytest.approx(expected, rel=1e-6)
    config = replace(
        loaded.config,
        run_dir=str(tmp_path / "golden"),
        cache_dir=str(tmp_path / "cache"),
        data={"path": (str(write_corpus(tmp_path / "corpus")),)},
        train={"num_steps": loaded.step + 1, "allow_data_change": True},
    )
    choice = choose(tmp_path / "golden" / "checkpoints", "latest", strict=True)
    state, meta = final_state(config)
    assert int(state.step) == loaded.step == choice.manifest.step and "loop" in meta
    assert trainer.train(config) == 0
    assert int(final_state(config)[0].step) == loaded.step + 1
    seen(f"step {loaded.step} loads with all its arrays; step {loaded.step + 1} is trained and saved")


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.slow
@pytest.mark.fault(
    27, "pickled code in every file of a run, of checkpoints the newest", "never executed; refused in one line"
)
def test_pickles_are_never_executed(config, tmp_path, seen):
    marker = tmp_path / "executed"
    payload = pickle.dumps(Payload(marker))
    run_dir = Path(config.run_dir)
    older = [folder(config, step) for step in (2, OLDER)]
    files = [path for path in run_dir.rglob("*") if path.is_file() and not set(older) & set(path.parents)]
    for path in files:
        content = path.read_bytes()
        path.write_bytes(payload)
        with contextlib.suppress(UserError):
            load_run(run_dir, "latest")
        if path.parent == run_dir:
            with contextlib.suppress(UserError):
                trainer.train(config)
        assert not marker.exists(), path
        path.write_bytes(content)
    seen(f"{len(files)} files, none executed")


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "metrics.jsonl"])
@pytest.mark.fault(12, "config.yaml, tokenizer.json or metrics.jsonl is garbage", "one line that names the file")
def test_damaged_descriptions_are_named(config, name, seen):
    path = Path(config.run_dir) / name
    path.write_bytes(b"\x00\xff garbage {\n")
    with pytest.raises(UserError, match=name) as error:
        if name == "metrics.jsonl":
            shutil.rmtree(folder(config))
            trainer.train(config)
        else:
            load_run(Path(config.run_dir), "latest")
    assert "\n" not in str(error.value)
    seen(str(error.value).removeprefix(str(Path(config.run_dir)) + "/"))


def test_what_cannot_be_read_is_never_pruned(config):
    flip(config)
    (folder(config, 2) / MANIFEST).unlink()
    os.truncate(next(folder(config, 4).rglob("params/*/0*")), 3)
    writer = Checkpoints(Path(config.run_dir), keep=1)
    for step in (10, 11, 12):
        writer.save_items(step, {"params": {"w": np.ones(3, np.float32)}}, {}, val_loss=1 / step)
    writer.close()
    # The files of 6 have the right sizes; a save does not verify the checksums of older checkpoints.
    assert checkpoints(config) == ["00000002", "00000004", "00000012"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../b", "", "a\\b", "a\0b"])
def test_a_manifest_cannot_name_files_outside(config, name):
    from gptjax.checkpoints import manifest

    path = folder(config) / MANIFEST
    content = json.loads(path.read_text())
    content.pop("checksum")
    content["files"][name] = [1, "0"]
    path.write_text(json.dumps(content | {"checksum": manifest._content_checksum(content)}))
    with pytest.raises(DamagedError, match="lies outside"):
        read_manifest(folder(config))
