"""Real launchers: Open MPI and SLURM, where Debian's packages of them are installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.checkpoints.run_dir import load_run
from tests.cluster.processes import devices_each
from tests.faults.runs import process_config, write_config
from tests.tiny import rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def needs(*programs: str) -> None:
    missing = [program for program in programs if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install openmpi-bin slurmctld slurmd slurm-client munge")


def small_run(tmp_path: Path):
    config = process_config(tmp_path, train={"num_steps": 4, "save_every": 2, "eval_every": 2})
    return config, [sys.executable, str(ROOT / "train.py"), str(write_config(config))]


def assert_trained(config, output: str) -> None:
    assert "processes   2" in output
    assert [row["step"] for row in rows(config) if "loss" in row] == [1, 2, 3, 4]
    assert load_run(Path(config.run_dir), "latest", strict=True).step == 4


def test_mpirun(tmp_path):
    needs("mpirun")
    config, train = small_run(tmp_path)
    as_root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    # Without the tests' GLIBC_TUNABLES, so that the program restarts itself once.
    environment = {name: value for name, value in devices_each(1).items() if name != "GLIBC_TUNABLES"}
    command = ["mpirun", *as_root, "--oversubscribe", "-n", "2", *train, "--cluster.lost_timeout", "600"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_trained(config, done.stdout)


def test_slurm(tmp_path):
    needs("munged", "slurmctld", "slurmd", "sbatch")
    if os.getuid():
        pytest.skip("starting SLURM's daemons needs root")
    config, train = small_run(tmp_path)
    script = tmp_path / "job.sh"
    script.write_text(sbatch_script().replace("python train.py CONFIG.yaml", " ".join(train)))
    environment = {name: value for name, value in devices_each(1).items() if name != "GLIBC_TUNABLES"}
    environment["PATH"] += ":/usr/sbin"
    job = ["sbatch", "--wait", "--nodes=1", "--ntasks-per-node=2", f"--output={tmp_path / 'job.log'}", str(script)]
    command = [str(ROOT / "tests/cluster/slurm.sh"), str(tmp_path / "slurm"), *job]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)
    log = (tmp_path / "job.log").read_text() if (tmp_path / "job.log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert_trained(config, log)


def sbatch_script() -> str:
    """The script that docs/scaling.md shows."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    return page.partition("```sbatch\n")[2].partition("```")[0]
