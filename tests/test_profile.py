"""The profile of a step: time is shared among operations that overlap, and a real trace is read."""

from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gptjax.cli import main
from gptjax.config.reader import to_yaml
from gptjax.report.trace import by_kind, descriptions, shared_time
from tests.tiny import run_config


def test_operations_that_overlap_share_the_clock():
    times = shared_time([(0, 10, "a"), (5, 15, "b"), (5, 10, "a"), (20, 20, "c")])
    assert times["a"] == pytest.approx(5 + 5 * 2 / 3) and times["b"] == pytest.approx(5 / 3 + 5)
    assert times.total() == pytest.approx(15), "that of the clock"


@pytest.mark.parametrize(
    ("name", "description", "kind"),
    [
        ("fusion.12", "dot_general", "matmul"),
        ("ffi_call.3", "gptjax_weight_gradient ffi_call", "matmul"),
        ("ffi_call.4", "gptjax_attention_gradient ffi_call", "attention"),
        ("custom-call.1", "__cublas$gemm dot_general", "matmul"),
        ("all-reduce.1", "add", "collective"),
        ("loop_add_fusion", "", "elementwise"),
        ("copy.4", "", "copy"),
        ("reduce-window", "", "reduction"),
        ("rng-bit-generator", "", "other"),
    ],
)
def test_kinds_go_by_what_operations_do(name, description, kind):
    assert by_kind(Counter({name: 3.0}), {name: description}) == {kind: 3.0}


def test_what_operations_do_is_read_from_the_program():
    program = jax.jit(lambda x: jnp.tanh(x @ x).sum()).lower(jnp.ones((64, 64))).compile().as_text()
    found = descriptions(program)
    assert "dot_general" in found.values() and any("tanh" in text or "reduce" in text for text in found.values())
    line = '  %ffi_call.3 = f32[2]{0} custom-call(%a), custom_call_target="gptjax_mlp", metadata={op_name="f/ffi_call"}'
    assert descriptions(line) == {"ffi_call.3": "gptjax_mlp ffi_call"}


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
