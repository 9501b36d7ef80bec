"""Plans compared with independent counts, and with the arrays of real steps."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiktoken
from jax.sharding import AbstractMesh, AxisType

from bench import plan as reality
from gptjax.cli import main
from gptjax.config.mesh import MeshConfig
from gptjax.config.reader import load_config, to_yaml
from gptjax.config.run import Config
from gptjax.config.tokenizer import TIKTOKEN_NAMES, TokenizerConfig
from gptjax.config.verbs.plan import CHIP_NAMES, PlanConfig
from gptjax.errors import UserError
from gptjax.machine.chips import CHIPS, Chip, chip_of
from gptjax.model.gpt import Compute
from gptjax.model.loss import batch_loss
from gptjax.ops.cross_entropy import LossOptions
from gptjax.parallel.fits import check_fits
from gptjax.parallel.mesh import make_mesh
from gptjax.planning import hlo, plan, suggest
from gptjax.planning.collectives import collectives
from gptjax.planning.compiled import Memory, abstract_state, compile_step, device_bytes
from gptjax.planning.describe import describe
from gptjax.report.cost import flops_per_token
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.tiny import CONFIG, MODEL, init_state, make_batch, replace

ROOT = Path(__file__).parents[1]
PRESETS = {"gpt3_6.7b": (8, 6.7e9), "gpt3_13b": (16, 12.9e9), "gpt3_175b": (512, 174.6e9)}
DEEP = replace(CONFIG, model={"n_layer": 4, "n_head": 4}, train={"batch_size": 16, "micro_batch_size": 4})


def run(*args: str) -> subprocess.CompletedProcess:
    """Runs `gptjax plan` in a separate process, so that the number of devices can be chosen."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gptjax", "plan", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def written(tmp_path: Path, config: Config) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(dataclasses.replace(config, cache_dir=str(ROOT / ".pytest_cache" / "plan"))))
    return str(path)


def step_of(config: Config, **axes: int):
    return compile_step(replace(config, mesh={"data": 1} | axes), make_mesh(MeshConfig(**({"data": 1} | axes))))


def test_state_bytes_equal_the_real_arrays():
    config = replace(DEEP, train={"ema": 0.9, "compute_dtype": "float16"})
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    state = jax.jit(lambda: init_state(config), out_shardings=where)()
    held = [sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(t)) for t in (state.params, state)]
    memory = step_of(config, fsdp=2, tensor=2).memory
    assert memory.parameters == held[0]
    batch = 4 * 16 * 16 * 4 // 2  # four int32 arrays, sharded over two devices
    assert memory.parameters + memory.optimizer + memory.other == held[1] + batch


@pytest.mark.slow
def test_activations_with_full_remat_are_the_residual_streams():
    deep, deeper = (
        step_of(replace(DEEP, model={"n_layer": n}, train={"remat": "full", "unroll": 1}), data=2, tensor=2).memory
        for n in (4, 7)
    )
    tokens = 4 * 16 // 2
    assert deeper.activations - deep.activations == 3 * tokens * MODEL.n_embd * 4


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 4}], ids=str)
def test_communication_does_not_depend_on_unrolling(axes):
    """Compares loops over layers and micro-batches with unrolled programs."""
    config = replace(DEEP, train={"batch_size": 12})
    rolled = step_of(replace(config, train={"unroll": 1}), **axes).collectives
    unrolled = step_of(replace(config, train={"unroll": 0}), **axes).collectives
    assert max(one.times for one in rolled) > 1
    # Without a loop some weights are gathered once for the forward and the backward pass.
    kinds = {"all-reduce", "reduce-scatter"} | ({"all-gather"} if "fsdp" not in axes else set())
    total, expected = (sum(one.sent * one.times for one in each if one.kind in kinds) for each in (rolled, unrolled))
    np.testing.assert_allclose(total, expected, rtol=0.01)


def test_an_all_reduce_read_in_slices_is_a_reduce_scatter():
    sent = step_of(DEEP, fsdp=4).collectives
    P = 12 * MODEL.n_embd**2 * 4  # weights of the blocks
    scattered = sum(one.sent * one.times for one in sent if one.kind == "reduce-scatter")
    gathered = sum(one.sent * one.times for one in sent if one.kind == "all-gather")
    assert scattered >= 4 * 3 / 4 * 4 * P  # four micro-batches, float32, without the device's own quarter
    assert gathered >= 2 * scattered * 0.9  # forward and backward


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ],
)
def test_device_groups_are_parsed_in_every_notation(text, groups):
    line = f"  %a = f32[8]{{0}} all-reduce(%b), {text}"
    if text.startswith("source"):
        line = line.replace("all-reduce", "collective-permute")
    program = hlo.parse(f"HloModule m\n\nENTRY %main (b: f32[8]) -> f32[8] {{\n{line}\n}}\n")
    [found] = collectives(program, 4)
    assert found.groups.tolist() == groups
    assert found.crosses_nodes(2) == any(a // 2 != b // 2 for a, *rest in groups for b in rest)
    n = len(groups[0])
    assert found.sent == (32 if text.startswith("source") else 2 * 32 * (n - 1) / n)


def test_model_flops_are_those_of_its_matmuls():
    """Counted in the traced gradient. Beyond the formula, attention computes its scores twice, and the gradient of a
    small table is a product.
    """
    batch = jax.tree.map(lambda x: x[0], make_batch())
    params = init_state(CONFIG).params

    def objective(params):
        options = LossOptions(MODEL.vocab_size)
        return batch_loss(MODEL, options, Compute(unroll=1), params, batch, None).objective

    counted = _matmul_flops(jax.make_jaxpr(jax.grad(objective))(params).jaxpr)
    D, T, L = MODEL.n_embd, MODEL.block_size, MODEL.n_layer
    expected = flops_per_token(MODEL, params) + 2 * L * T * D + 2 * D * (MODEL.vocab_size + T)
    assert counted == batch.inputs.size * expected


def _matmul_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            total += times * _matmul_flops(inner) if hasattr(inner, "eqns") else 0
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
    return total


TOY = Chip(kinds=(), peak_flops=1e9, memory=1e5, memory_rate=1e9, node=2, link=1e8, network=1e7)


@pytest.mark.slow
def test_a_layout_that_does_not_fit_gets_a_suggestion_that_does(monkeypatch):
    given = replace(DEEP, mesh={"data": 4}, model={"n_embd": 64}, train={"micro_batch_size": 16})
    whole = plan.plan_step(given, TOY, print).memory.total
    monkeypatch.setitem(CHIPS, "h100", dataclasses.replace(TOY, memory=0.7 * whole))
    options = PlanConfig(devices=4, chip="h100")
    first, second = plan.plan_run(given, options, print)
    assert not first.fits and second is not None and second.fits
    check_fits(second.config, make_mesh(second.config.mesh))
    assert second.memory.total <= plan.USABLE * 0.7 * whole
    text = describe(first, second, options)
    assert "does NOT fit" in text and f"--train.micro_batch_size {second.config.train.micro_batch}" in text
    monkeypatch.setitem(CHIPS, "h100", dataclasses.replace(TOY, memory=1e4))
    first, second = plan.plan_run(given, options, print)
    assert second is None and "nothing was found that fits 4 x h100" in describe(first, second, options)


def test_every_suggestion_can_be_sharded():
    config = replace(DEEP, model={"n_layer": 6, "n_kv_head": 2, "n_embd": 48})
    found = suggest.suggestions(config, CHIPS["h100"], 24, 1e9, 1.0, 1e12)
    assert {one.mesh.size for one in found} == {24}
    for one in found:
        sizes = dataclasses.asdict(one.mesh)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        check_fits(one, mesh)  # pyright: ignore[reportArgumentType]: it reads only the sizes
    assert not suggest.suggestions(config, CHIPS["h100"], 24, 1e3, 1.0, 1e12)


def test_vocabularies_are_those_of_the_tokenizers():
    assert set(plan.VOCABULARIES) == set(TIKTOKEN_NAMES)
    without = replace(CONFIG, model={"vocab_size": 0})
    of_bytes = dataclasses.replace(without, tokenizer=TokenizerConfig(kind="bytes"))
    assert plan.resolve(of_bytes).model.vocab_size == ByteTokenizer().vocab_size
    assert plan.resolve(without).model.vocab_size == 50257
    with pytest.raises(
        UserError, match=r"kind=chars: the vocabulary size depends on the corpus; give --model.vocab_size"
    ):
        plan.resolve(dataclasses.replace(without, tokenizer=TokenizerConfig(kind="chars")))
    with pytest.raises(UserError, match=r"task.kind=instruct: plan supports only task.kind=pretrain"):
        plan.resolve(replace(CONFIG, task={"kind": "instruct"}))


def test_the_vocabulary_of_gpt2_is_as_large_as_the_published_one():
    try:
        published = tiktoken.get_encoding("gpt2").n_vocab
    except OSError as error:
        pytest.skip(f"needs the vocabulary of gpt2 (set TIKTOKEN_CACHE_DIR): {error}")
    assert plan.VOCABULARIES["gpt2"] == published


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_a_chip_is_recognised_by_its_drivers_name(kind, name):
    assert chip_of(kind) is CHIPS[name]


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA L400", "NVIDIA H1000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Tesla V100-SXM2-16GB"]
)
def test_a_chip_outside_the_table_is_not_recognised(kind):
    assert chip_of(kind) is None


@pytest.mark.parametrize(
    ("name", "teraflops", "gigabytes", "gigabytes_per_second"),
    [  # from the data sheets again, dense bfloat16
        ("h100", 1979 / 2, 80, 3350),
        ("h100-pcie", 1513 / 2, 80, 2000),
        ("h100-nvl", 1671 / 2, 94, 3900),
        ("h200", 1979 / 2, 141, 4800),
        ("h200-nvl", 1671 / 2, 141, 4800),
        ("gh200", 1979 / 2, 96, 4000),
        ("b200", 4500 / 2, 180, 8000),
        ("gb200", 5000 / 2, 186, 8000),
        ("a100", 312, 80, 2039),
        ("a100-pcie", 312, 80, 1935),
        ("a100-40gb", 312, 40, 1555),
        ("a100-40gb-pcie", 312, 40, 1555),
        ("l4", 242 / 2, 24, 300),
        ("l40", 362.1 / 2, 48, 864),
        ("l40s", 733 / 2, 48, 864),
    ],
)
def test_rates_are_those_of_the_data_sheets(name, teraflops, gigabytes, gigabytes_per_second):
    chip = CHIPS[name]
    assert chip.peak_flops == pytest.approx(teraflops * 1e12, rel=0.015)  # sheets round; L40S has 362 and 733
    assert (chip.memory, chip.memory_rate) == (gigabytes * 1e9, gigabytes_per_second * 1e9)


def test_plan_accepts_and_lists_exactly_the_chips_of_the_table():
    assert tuple(CHIPS) == CHIP_NAMES
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)
    listed = re.search(
        r"\n    chip: str\n    \"\"\"Chip to plan for: (.*?)\.\"\"\"", inspect.getsource(PlanConfig), re.DOTALL
    )
    assert listed and tuple(re.findall(r"[a-z0-9-]+", listed[1].replace(" or ", " "))) == CHIP_NAMES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chip", "h100"], "devices is missing"),
        (["--devices", "8"], "chip is missing"),
        (["--devices", "8", "--chip", "h10"], "chip='h10' must be one of .* Did you mean 'h100'"),
        (["--devices", "0", "--chip", "v5e"], "devices=0 must be at least 1"),
        (["--devices", "513", "--chip", "v5e"], "devices=513 must be at most 512"),
        (["--devices", "8", "--chip", "v5e", "--model.n_layers", "3"], "unknown option --model.n_layers"),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, flags, message):
    assert main(["plan", written(tmp_path, CONFIG), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_an_impossible_mesh_gets_a_one_line_error(tmp_path):
    path = written(tmp_path, CONFIG)
    done = run(path, "--devices", "8", "--chip", "v5e", "--mesh.data", "3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "mesh.data=3 does not match 8 device(s)" in done.stderr
    done = run(path, "--devices", "8", "--chip", "v5e", "--mesh.tensor", "8")
    assert done.returncode == 2 and "mesh.tensor=8 does not divide model.n_head=2" in done.stderr


@pytest.mark.slow
def test_a_plan_is_printed_as_text_and_as_json(tmp_path):
    path = written(tmp_path, CONFIG)
    flags = ("--devices", "8", "--chip", "h100", "--train.compute_dtype", "bfloat16")
    done = run(path, *flags)
    assert done.returncode == 0, done.stderr
    assert "data 8" in done.stdout and "989 TFLOP/s" in done.stdout and "suggested" in done.stdout
    values = json.loads(run(path, *flags, "--json").stdout)
    given = values["given"]
    assert (values["devices"], values["chip"], given["mesh"]["data"]) == (8, "h100", 8)
    parts = {field.name for field in dataclasses.fields(Memory)}
    assert sum(given["memory"][part] for part in parts) == given["memory"]["total"]
    assert given["seconds"] >= given["seconds_if_hidden"] > 0
    assert given["run_hours"] == pytest.approx(20 * given["seconds"] / 3600)
    assert "20 steps: " in done.stdout and " h100-hours" in done.stdout


@pytest.mark.parametrize("name", PRESETS)
def test_the_large_presets_can_be_sharded_and_have_their_size(name):
    devices, parameters = PRESETS[name]
    config = plan.resolve(load_config(ROOT / "configs" / f"{name}.yaml"))
    sizes = dataclasses.asdict(config.mesh)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    assert config.mesh.size == devices
    check_fits(config, mesh)  # pyright: ignore[reportArgumentType]: it reads only the sizes
    state = abstract_state(config, mesh)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == pytest.approx(parameters, rel=0.01)
    assert device_bytes(state) < 0.5 * CHIPS["h100"].memory


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_the_large_presets_plan_and_fit(name):
    done = run(f"configs/{name}.yaml", "--devices", str(PRESETS[name][0]), "--chip", "h100", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["given"]["fits"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2, 3, 4, 5, 6], ids=lambda number: reality.CASES[number][0])
def test_a_plans_memory_is_that_of_the_real_step(number):
    planned, held = reality.measure(number)
    assert planned == pytest.approx(held, rel=0.1)
