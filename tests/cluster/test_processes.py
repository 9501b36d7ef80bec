"""Two and four processes, with the collectives of a cluster of CPUs, compute the same run as a single process."""

from pathlib import Path

import pytest

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.reader import load_config, to_yaml
from gptjax.report.metrics import METRICS_FILE
from gptjax.training import trainer
from tests.cluster.processes import LOSSES, largest_difference, run, started
from tests.faults.runs import process_config, write_config
from tests.tiny import HARD, replace, rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process that has four devices."""
    config = process_config(tmp_path_factory.mktemp("alone"), **HARD)
    assert trainer.train(config) == 0
    return config


@pytest.mark.slow
def test_four_processes_are_one_run(tmp_path, alone):
    config = replace(alone, run_dir=str(tmp_path / "run"), mesh={"data": 1, "fsdp": 2, "tensor": 2},
                     model={"vocab_multiple": 2})  # fmt: skip
    processes = run(write_config(config), 4)
    assert largest_difference(rows(config), rows(alone)) < LOSSES
    assert largest_difference(rows(config), rows(alone), "val_loss") < LOSSES
    assert len(rows(config)) == len(rows(alone))
    assert (tmp_path / "run" / "samples.txt").read_text().count("--- step") == 2
    assert "processes   4" in processes.out(0)
    own = [line for line in processes.out(1).splitlines() if not line.startswith("[Gloo]")]
    assert not own, "process 0 alone has said something"
    assert not any(processes.error(process) for process in range(4))
    assert load_run(Path(config.run_dir), "latest", strict=True).step == 6
    assert load_config(tmp_path / "run" / "config.yaml").cluster == type(config.cluster)()


def test_processes_that_disagree_stop_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # an unreachable proxy, which must not be used
    monkeypatch.delenv("no_proxy", raising=False)
    config = process_config(tmp_path, train={"num_steps": 2})
    with started(write_config(config), 2, own={1: ("--seed", "1")}) as processes:
        assert processes.wait() == [2, 2]
    line = "gptjax: the processes disagree on seed: 0 on process 0, 1 on process 1; start all of them with the same"
    assert [processes.error(process).count("\n") for process in range(2)] == [1, 1]
    assert all(processes.error(process).startswith(line) for process in range(2))
    assert not (tmp_path / "run" / METRICS_FILE).exists()


@pytest.mark.slow
def test_other_data_under_the_same_name_is_an_error(tmp_path):
    config = process_config(tmp_path, train={"num_steps": 2})
    process_config(tmp_path / "other")
    (tmp_path / "other" / "corpus" / "000.txt").write_text("another text\n" * 50)
    config = replace(config, data={"path": ("corpus",)})
    with started(write_config(config), 2, folders={0: tmp_path, 1: tmp_path / "other"}) as processes:
        assert processes.wait() == [2, 2]
    for process in range(2):
        assert processes.error(process).startswith("gptjax: the processes disagree on the data: '")
        assert processes.error(process).count("\n") == 1


@pytest.mark.slow
def test_a_user_error_of_one_process_is_raised_on_all(tmp_path):
    config = process_config(tmp_path, train={"num_steps": 2})
    config = replace(config, data={"path": ("corpus",)})
    (tmp_path / "empty").mkdir()
    with started(write_config(config), 2, folders={0: tmp_path, 1: tmp_path / "empty"}) as processes:
        assert processes.wait() == [2, 2]
    assert processes.error(0) == processes.error(1).replace("gptjax: ", "gptjax: process 1: ")
    assert "corpus" in processes.error(0)


@pytest.mark.slow
def test_a_run_directory_that_is_not_shared_is_an_error(tmp_path):
    config = replace(process_config(tmp_path), run_dir="run")
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    (tmp_path / "elsewhere").mkdir()
    with started(path, 2, folders={0: tmp_path, 1: tmp_path / "elsewhere"}) as processes:
        assert processes.wait() == [2, 2]
    for process in range(2):
        assert processes.error(process).startswith("gptjax: run_dir=run: process 1 does not see what process 0 writes")
