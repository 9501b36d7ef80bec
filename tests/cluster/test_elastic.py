"""Runs that go on with other devices, meshes and processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import environment

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout():
    layouts = {"--from": ("4", "5"), "--to": ("0", "1", "6", "7")}  # see LAYOUTS in bench/elastic.py
    flags = [word for name, numbers in layouts.items() for word in (name, *numbers)]
    command = [sys.executable, str(ROOT / "bench" / "elastic.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("e-") == 8, "a difference for every pair"
