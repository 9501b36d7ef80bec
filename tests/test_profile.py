"""The profile of a step: time is shared among operations that overlap, and a real trace is read."""

from pathlib import Path

import pytest

from gptjax.cli import main
from gptjax.config.reader import to_yaml
from gptjax.report.trace import by_kind, kind_of, shared_time
from tests.tiny import run_config


def test_operations_that_overlap_share_the_clock():
    times = shared_time([(0, 10, "a"), (5, 15, "b"), (5, 10, "a"), (20, 20, "c")])
    assert times["a"] == pytest.approx(5 + 5 * 2 / 3) and times["b"] == pytest.approx(5 / 3 + 5)
    assert times.total() == pytest.approx(15), "that of the clock"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dot.12", "matmul"),
        ("custom-call.3", "custom call"),
        ("gemm_fusion_dot.1", "matmul"),
        ("all-reduce.1", "collective"),
        ("loop_add_fusion", "fused elementwise"),
        ("copy.4", "copy"),
        ("reduce-window", "reduction"),
        ("rng-bit-generator", "other"),
    ],
)
def test_kinds_go_by_names(name, kind):
    assert kind_of(name) == kind
    assert by_kind({name: 3.0, f"{name}.1": 4.0}) == {kind: 7.0}


def test_a_run_is_profiled_and_left_alone(tmp_path, capsys):
    config = run_config(tmp_path)
    (tmp_path / "a.yaml").write_text(to_yaml(config))
    out = tmp_path / "trace"
    assert main(["profile", str(tmp_path / "a.yaml"), "--steps", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "ms per step" in printed and "kind of operation" in printed and "tokens/s" in printed
    shares = [float(line.split("%")[0].split()[-1]) for line in printed.split("\n\n")[1].splitlines()[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert list(out.rglob("*.xplane.pb")) and not Path(config.run_dir).exists()
    assert main(["profile", str(tmp_path / "a.yaml"), "--out", str(out)]) == 2
