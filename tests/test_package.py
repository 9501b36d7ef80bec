"""The wheel: it holds every file of the package, and works outside of the clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_has_every_file_and_starts_outside_of_the_clone(tmp_path):
    pytest.importorskip("hatchling", reason="needs the extra dev")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(built, check=True)
    [wheel] = tmp_path.glob("gptjax-*.whl")
    tracked = subprocess.run(["git", "ls-files", "gptjax"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = set(zipfile.ZipFile(wheel).namelist())
    assert set(tracked.stdout.split()) <= files
    assert not [name for name in files if name.startswith(("tests/", "bench/", "docs/"))]
    place = tmp_path / "site"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(place), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(place)}

    def run(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, *args], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import gptjax; print(gptjax.__file__)").startswith(str(place))
    assert "scaling-fit" in run("-m", "gptjax", "--help")
    check = "from gptjax.report import page, reference; assert reference.references(); page.asset('report.js')"
    run("-c", check)
