"""Functions for several processes, tested in one: detection of clusters, batches, comparisons, messages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptjax.batches.labelled import TextBatches, encode_texts
from gptjax.batches.multi import MultiBatches
from gptjax.batches.packed import PackedSequences, TargetSequence
from gptjax.batches.rows import take_rows
from gptjax.cli import main
from gptjax.config import cluster as cluster_options
from gptjax.config.cluster import ClusterConfig
from gptjax.config.mesh import MeshConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.parallel import cluster, relay
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.place import rows_of_process
from gptjax.text.labelled import Text
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.tiny import assert_trees_equal

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, ""),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, ""),  # the batch script itself, without srun
        (OPEN_MPI, "Open MPI"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),
    ],
)
def test_a_cluster_is_detected_by_its_variables(environment, name):
    assert cluster.detect(environment) == name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "node7"}, "cluster.coordinator='node7' must be HOST:PORT"),
        ({"coordinator": "node7:1"}, "cluster.num_processes=0 must be at least 1"),
        ({"coordinator": "node7:1", "num_processes": 2}, r"cluster.process_id=-1 must lie in \[0, 2\)"),
        ({"coordinator": "node7:1", "num_processes": 2, "process_id": 2}, "cluster.process_id=2 must lie in"),
        ({"num_processes": 2}, "cluster.num_processes=2 has no effect without cluster.coordinator"),
        ({"process_id": 1}, "cluster.process_id=1 has no effect without cluster.coordinator"),
        ({"coordinator": "a:1", "num_processes": 1, "process_id": 0, "detect": False}, "cluster.detect=False has no"),
        ({"start_timeout": 0}, "cluster.start_timeout=0 must be at least 1"),
        ({"lost_timeout": -1}, "cluster.lost_timeout=-1 must be at least 1"),
    ],
)
def test_wrong_options_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        cluster_options.ClusterConfig(**flags)


def test_a_single_process_connects_to_no_other():
    with cluster.joined(ClusterConfig(coordinator="nowhere.invalid:1", num_processes=1, process_id=0)):
        assert cluster.is_first() and cluster.gather("text") == ["text"]
        assert [cluster.Agreement()(number) for number in (0, 15)] == [0, 15]


def test_a_cluster_with_missing_variables_is_an_error(tmp_path, monkeypatch, capsys):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "c.yaml"
    path.write_text("data: {source: python-stdlib}\n")
    code = "import sys\nfrom gptjax.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "train", str(path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the processes of SLURM cannot be joined" in done.stderr and "give --cluster.coordinator" in done.stderr
    assert main(["train", str(tmp_path / "none.yaml"), "--cluster.detect", "false"]) == 2  # it gets as far as the file
    assert "no such config file" in capsys.readouterr().err


def text_batches() -> TextBatches:
    texts = [Text("a" * (1 + number % 7), ("x" if number % 2 else "y",), "row") for number in range(11)]
    task = TaskConfig(kind="classify", labels=("x", "y"), augment_delete=0.3)
    return TextBatches(encode_texts(texts, ByteTokenizer(), task.labels, False, 16), task, seed=0)


def sequences() -> PackedSequences:
    lengths = [3, 5, 2, 7, 1, 6, 4]
    arrays = [np.arange(length, dtype=np.int32) for length in lengths]
    return PackedSequences([TargetSequence(array, array) for array in arrays], 8, seed=0)


@pytest.mark.parametrize(
    "windows",
    [text_batches(), sequences(), MultiBatches({"a": text_batches(), "b": sequences()}, {"a": 1.0, "b": 2.0})],
    ids=["texts", "sequences", "several tasks"],
)
def test_the_sequences_of_all_processes_form_the_batch(windows):
    rows = np.array([0, 1, 4, 5])
    for step in (0, 3):
        assert_trees_equal(windows.batch(step, 8, rows), take_rows(windows.batch(step, 8), rows))


def test_a_single_process_has_all_sequences_in_order():
    for axes in ({"data": 4}, {"data": 2, "tensor": 2}, {"data": 1, "fsdp": 4}):
        np.testing.assert_array_equal(rows_of_process(make_mesh(MeshConfig(**axes)), 16, 8), np.arange(16))


def test_disagreements_are_reported_with_both_values(monkeypatch):
    def gathered(text: str) -> list[str]:
        return [text, text, json.dumps(json.loads(text) | {"train.batch_size": 16})]

    monkeypatch.setattr(cluster, "gather", gathered)
    with pytest.raises(cluster.SharedError) as error:
        cluster.require_same({"seed": 0, "train.batch_size": 8}, "start all with the same config")
    assert str(error.value) == (
        "the processes disagree on train.batch_size: 8 on process 0, 16 on process 2; start all with the same config"
    )
    monkeypatch.setattr(cluster, "gather", lambda text: [text, text])
    cluster.require_same({"seed": 0}, "")


ABORT = f"""F1123 1 {relay.ABORTED.decode()}. This most likely indicates that another task died
RPC: /xla.coordination.CoordinationService/%s
*** Check failure stack trace: ***
    @     0x7f
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nE1123 coordination_service_agent.cc:289] Polled an error\nb\n", "a\nb\n"),
        (
            f"a\nE1123 coordination_service.cc:9] {relay.LIST.decode()} (stopped sending heartbeats):\n1\n"
            "The tasks have crashed. Check the task logs for an earlier error\n2\n",
            "a\n2\n",
        ),
        ("a\n" + ABORT % "PollForError", "a\nLOST\n"),
        (ABORT % "RegisterTask", "LATE\n"),
        ("LOST\n" + ABORT % "PollForError", "LOST\n"),
        ("no end of line", "no end of line"),
    ],
)
def test_the_abort_log_of_jaxlib_becomes_one_line(text, expected):
    command = [sys.executable, "-S", str(Path(relay.__file__)), "LOST", "LATE"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (0, expected)
