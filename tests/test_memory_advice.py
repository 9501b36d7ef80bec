"""Out of memory: the line names what to lower, and what it names needs less by the planner's estimate."""

import re

import jax
import pytest

from gptjax.cli import main
from gptjax.errors import is_out_of_memory
from gptjax.planning.memory_advice import explain_out_of_memory
from gptjax.training import trainer
from gptjax.training.trainer import explain_new_shapes
from tests.tiny import CONFIG, replace, write_corpus

ERROR = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 35.2GiB.")
ON_ONE = replace(
    CONFIG, mesh={"data": 1}, model={"n_layer": 4, "n_embd": 64, "block_size": 512}, train={"batch_size": 64}
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:1])


def estimated(line: str) -> list[float]:
    """Bytes with the change, and without it."""
    found = re.search(r"estimated ([\d.]+) ([kMG])B in place of ([\d.]+) ([kMG])B", line)
    assert found, line
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}
    return [float(found[1]) * factor[found[2]], float(found[3]) * factor[found[4]]]


def test_the_micro_batch_is_lowered_first_and_only_as_far_as_needed():
    line = explain_out_of_memory(ON_ONE, ERROR, int(200e6))
    assert "the allocation that failed: 35.2GiB" in line and "which has 200 MB" in line
    few = int(re.search(r"set train.micro_batch_size 64 -> (\d+): ", line)[1])
    with_change, without = estimated(line)
    assert with_change <= 0.9 * 200e6 < without
    assert 64 % few == 0 and estimated(explain_out_of_memory(ON_ONE, ERROR, int(100e6)))[0] <= 0.9 * 100e6
    more = re.search(r"64 -> (\d+)", explain_out_of_memory(ON_ONE, ERROR, int(400e6)))
    assert int(more[1]) > few, "with more memory, less is lowered"


def test_a_single_sequence_recomputes_then_gets_shorter():
    one = replace(ON_ONE, train={"batch_size": 1})
    assert "set train.remat none -> full: " in explain_out_of_memory(one, ERROR, int(20e6))
    assert "set model.block_size 512 -> " in explain_out_of_memory(one, ERROR, int(8e6))
    local = replace(one, model={"attention_window": 300}, train={"remat": "full", "batch_size": 8})
    assert "model.block_size" not in explain_out_of_memory(local, ERROR, int(1e6)), "the window would have no effect"
    ramp = replace(ON_ONE, train={"batch_ramp": ("0:12", "5:64")})
    assert "set train.micro_batch_size 64 -> 4: " in explain_out_of_memory(ramp, ERROR, int(200e6)), "divides 12 and 64"
    assert "use more devices with mesh.fsdp" in explain_out_of_memory(one, ERROR, int(1e6))


def test_training_that_runs_out_of_memory_ends_with_that_line(tmp_path, monkeypatch, capsys):
    def exhausted(*_args):
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 123456789 bytes.")  # as compiled programs do

    monkeypatch.setattr(trainer, "_run", exhausted)
    corpus, cache = write_corpus(tmp_path / "corpus"), str(tmp_path / "cache")
    options = ["--data.path", str(corpus), "--run_dir", str(tmp_path / "run"), "--cache_dir", cache]
    small = ["--model.n_layer", "1", "--model.n_embd", "16", "--model.n_head", "1", "--tokenizer.kind", "bytes"]
    assert main(["train", *options, *small, "--mesh.data", "1"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("gptjax: out of memory on the device (the allocation that failed: 123456789 bytes)")
    assert line.count("\n") == 1 and "Traceback" not in line


def test_other_errors_are_not_taken_for_it():
    assert is_out_of_memory(ERROR) and not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: bug"))


def test_arrays_with_new_shapes_are_named():
    old = (("inputs", (1, 8, 128)), ("segments", (1, 8, 128)), ("targets", (1, 8, 128)))
    new = (("inputs", (1, 8, 64)), ("targets", (1, 8, 128)))
    words = "batch.inputs has shape (1, 8, 64), was (1, 8, 128); batch.segments is missing"
    assert explain_new_shapes(old, new) == words
