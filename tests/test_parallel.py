"""Runs on eight devices compared with the same run on one (`bench/equality.py`), and runs that cannot be sharded."""

import fcntl
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import equality
from gptjax.config.mesh import MeshConfig
from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.model.gpt import Compute, hidden_states
from gptjax.ops import ring_attention
from gptjax.ops.attention import attention
from gptjax.ops.attention_spec import AttentionSpec, Mask
from gptjax.ops.plain_attention import attention_reference
from gptjax.parallel.fits import check_fits
from gptjax.parallel.mesh import make_mesh, replicated, traced_in
from gptjax.parallel.pipeline import bubble
from gptjax.parallel.rules import RULES, shardings
from gptjax.training.trainer import train
from tests.test_adapters import ADAPTERS
from tests.tiny import CONFIG, MODEL, init_state, replace, run_config

ROOT = Path(__file__).parents[1]
FOUR = "fsdp=2,tensor=2"
"""A mesh that this process has devices for."""
EIGHT = ("fsdp=2,tensor=2,context=2", *equality.MESHES)
MESHES = [FOUR, *(pytest.param(name, marks=pytest.mark.slow) for name in EIGHT)]


@functools.cache
def rows() -> dict[str, equality.Row]:
    """Results of `bench/equality.py` for one device and eight, by mesh; shared by the test workers."""
    cache = ROOT / ".pytest_cache"
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled")}
    command = [sys.executable, "bench/equality.py", "--json", *EIGHT]
    cache.mkdir(exist_ok=True)
    with open(cache / f"rows-of-{run}", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not (text := file.read()):
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            text = done.stdout
            file.write(text)
    found = [equality.Row(**json.loads(line)) for line in text.splitlines()]
    return {row.mesh: row for row in found}


@functools.cache
def row_of(name: str) -> equality.Row:
    """Results for a mesh; of four devices, after one step."""
    return equality.compare(name, steps=1) if name == FOUR else rows()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_a_run_does_not_depend_on_its_sharding(name):
    row, alone = rows()[name], rows()["one device"]
    assert len(row.losses) == 20 and row.losses[-1] < row.losses[0]
    # float32 sums in another order, 20 steps of Adam on
    np.testing.assert_allclose(row.losses, alone.losses, atol=1e-5)
    assert row.gradient_difference < 1e-5
    assert not alone.collectives


@pytest.mark.parametrize("name", MESHES)
def test_parameters_and_moments_are_sharded(name):
    row, mesh = row_of(name), equality.parse(name)
    parts = mesh.fsdp * mesh.tensor * mesh.stage
    state = init_state(equality.CONFIG)
    params, moments = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.opt_state))
    named = [(path[-1].key, leaf.nbytes) for path, leaf in jax.tree.leaves_with_path(state.params)]
    small = ("scale", "bias", "positions") if mesh.tensor > 1 else ("scale", "bias")
    whole = sum(size for name, size in named if name.startswith("b_") or name in small)  # may stay unsharded
    assert params / parts <= row.param_bytes <= (params - whole) / parts + whole
    counter = 4  # the update count, which every device has
    moments -= counter
    assert moments / parts <= row.moment_bytes - counter <= (moments - 2 * whole) / parts + 2 * whole


@pytest.mark.parametrize("name", MESHES)
def test_no_array_is_gathered_unnecessarily(name):
    row, mesh = row_of(name), equality.parse(name)
    found = {kind for kind, count in row.collectives.items() if count}
    allowed = {"all-reduce"}
    if mesh.fsdp > 1:
        allowed |= {"all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
    if mesh.tensor > 1:  # the table of the vocabulary, which 61 tokens do not divide, goes from its width to its rows
        allowed |= {"all-to-all", "all-gather", "collective-permute"}
    if mesh.context > 1 or mesh.stage > 1:
        allowed |= {"collective-permute"}
    if mesh.stage > 1:
        allowed |= {"all-gather"}  # the table again
    assert found <= allowed
    D, V = equality.CONFIG.model.n_embd, equality.CONFIG.model.vocab_size
    assert row.largest_gather <= max(
        4 * D * D if mesh.fsdp > 1 else 0, (V + 3) * D
    )  # a weight of a layer, or the table


def test_ring_attention_equals_the_reference(monkeypatch):
    """Windows, segments, grouped heads, dropout, and several blocks in both halves of each device."""
    monkeypatch.setattr(ring_attention, "LARGEST_BLOCK", 2)
    B, T, H, G, C = 2, 24, 4, 2, 8
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, n, C)) for i, n in enumerate((H, G, G)))
    segments = jnp.asarray(np.arange(T)[None] // np.array([[9], [17]]))
    mesh = make_mesh(MeshConfig(data=1, context=3), jax.devices()[:3])

    def value_and_gradients(function, q, k, v, *options):
        def objective(q, k, v):
            y = function(q, k, v, *options)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

        gradients, y = jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return y, *gradients

    for options in (
        (AttentionSpec(window=7, scale=0.4), Mask(segments), None, None),
        (AttentionSpec(dropout=0.3), Mask(), None, jax.random.key(5)),
    ):
        ring = traced_in(mesh, lambda *x, options=options: value_and_gradients(attention, *x, *options))
        plain = functools.partial(
            lambda *x, options: value_and_gradients(attention_reference, *x, *options), options=options
        )
        ring = jax.jit(ring).lower(*jax.device_put((q, k, v), replicated(mesh))).compile()
        assert {kind for kind, _ in equality.collectives(ring)} >= {"collective-permute"}
        for a, e in zip(ring(*jax.device_put((q, k, v), replicated(mesh))), jax.jit(plain)(q, k, v), strict=True):
            np.testing.assert_allclose(a, e, atol=1e-5)  # float32 sums in another order


def test_layers_on_stages_compute_the_same_function():
    """The forward pass alone, as in evaluation: micro-batches pass through the stages."""
    config = replace(CONFIG, model={"n_layer": 4}).model
    mesh = make_mesh(MeshConfig(data=1, stage=4))
    params = init_state(replace(CONFIG, model={"n_layer": 4})).params
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 0, MODEL.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
    compute = Compute(unroll=1)

    def states(params):
        return hidden_states(config, params, tokens, positions, compute=compute)

    expected = jax.jit(states)(params)
    streamed = jax.jit(traced_in(mesh, states)).lower(jax.device_put(params, shardings(mesh, params))).compile()
    np.testing.assert_allclose(streamed(jax.device_put(params, shardings(mesh, params))), expected, atol=2e-6)
    gathered = [size for kind, size in equality.collectives(streamed) if kind == "all-gather"]
    assert max(gathered) <= MODEL.vocab_size * MODEL.n_embd  # the table, but no block's weights


def test_every_rule_matches_a_parameter():
    """For a model with every optional part, and its optimizer's state."""
    new = {"init_from": "base", "finetune": {"train": "new"}}
    variants = [
        {"tied_embeddings": False, "embedding_norm": True, "output_bias": True, "positions": "t5", "gated": True},
        {"bias": False, "qk_norm": "head", "norm_position": "sandwich", "residual_mix": True, "n_expert": 2},
        {"value_residual": True, "learned_skips": True, "positions": "shaw"},
    ]
    runs = [
        *({"model": variant} for variant in variants),
        {"optim": {"name": "adafactor"}},
        *({"model": {"adapter": kind}, **new} for kind in ADAPTERS.values()),
    ]
    train = {"compute_dtype": "float16", "ema": 0.9}
    states: list = [
        jax.eval_shape(lambda c=c: init_state(c)) for c in (replace(CONFIG, train=train, **r) for r in runs)
    ]
    states.append({"heads": {"classify": {"w": jnp.zeros((2, 4)), "bias": jnp.zeros(2)}}})
    paths = jax.tree.leaves_with_path(states)
    names = [jax.tree_util.keystr(path[1:], simple=True, separator="/") for path, _ in paths]
    first = {next(pattern for pattern, *_ in RULES if re.search(pattern, name)) for name in names}
    assert first == {pattern for pattern, *_ in RULES}


@pytest.mark.parametrize(
    ("axes", "change", "message"),
    [
        (
            {"data": 4},
            {"train": {"batch_size": 6}},
            r"train.batch_size=6 must be divisible by the 4 devices that share",
        ),
        ({"tensor": 4}, {"model": {"n_head": 2}}, r"mesh.tensor=4 does not divide model.n_head=2"),
        ({"tensor": 4}, {"model": {"n_head": 4, "n_kv_head": 2}}, r"mesh.tensor=4 does not divide model.n_kv_head=2"),
        ({"stage": 4}, {"model": {"n_layer": 6}}, r"mesh.stage=4 does not divide model.n_layer=6"),
        ({"context": 4}, {"model": {"block_size": 20}}, r"model.block_size=20 must be a multiple of 8, two chunks for"),
        (
            {"stage": 2},
            {"model": {"adapter": ADAPTERS["prompt"]}, "init_from": "base", "finetune": {"train": "new"}},
            r"mesh.stage=2 cannot be combined with .*kind=prompt",
        ),
    ],
)
def test_unshardable_runs_are_rejected(axes, change, message):
    mesh = make_mesh(MeshConfig(**({"data": 1} | axes)), jax.devices()[: MeshConfig(**({"data": 1} | axes)).size])
    with pytest.raises(UserError, match=message) as error:
        check_fits(replace(CONFIG, **change), mesh)
    assert "\n" not in str(error.value)


def test_the_pipeline_bubble_follows_its_formula():
    assert bubble(1, 8) == 0.0
    assert bubble(4, 1) == 0.75  # with one micro-batch, one stage of four is busy
    assert bubble(4, 9) == 0.25


@pytest.mark.slow
def test_a_whole_run_on_every_axis_of_four_devices(tmp_path, capsys):
    """Trains, evaluates, samples, saves, and resumes with another mesh."""
    config = run_config(tmp_path, mesh={"data": 1, "context": 2, "stage": 2}, train={"micro_batch_size": 2})
    config = replace(config, train={"sample_tokens": 4, "num_steps": 4})
    assert train(config) == 0
    said = capsys.readouterr().out
    assert "context 2 x stage 2" in said and "2 stages, 4 micro-batches: a stage waits 20 % of a step" in said
    alone = replace(config, mesh={"data": -1, "context": 1, "stage": 1, "tensor": 2}, train={"num_steps": 6})
    assert train(alone) == 0


CHANGES: dict[str, dict] = {
    "remat full, window, no dropout, z-loss, smoothing": {
        "model": {"attention_window": 5, "dropout": 0.0},
        "train": {"remat": "full", "z_loss": 0.1, "label_smoothing": 0.1},
    },
    "remat dots, one micro-batch, untied, no bias": {
        "model": {"tied_embeddings": False, "bias": False, "vocab_multiple": 16},
        "train": {"remat": "dots", "unroll": 0, "micro_batch_size": 0},
    },
    "bfloat16": {"train": {"compute_dtype": "bfloat16", "param_dtype": "bfloat16"}},
    "float16": {"train": {"compute_dtype": "float16"}},
    **{
        f"{kind} adapter": {"model": {"adapter": ADAPTERS[kind]}, "init_from": "base", "finetune": {"train": "new"}}
        for kind in ("lora", "bottleneck", "prefix")
    },
}


@functools.cache
def run_alone(name: str) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and gradients of two steps on one device."""
    losses, first, _, _ = equality.run(replace(equality.CONFIG, **CHANGES[name]), equality.parse(""), 2)
    return losses, equality.gradients(first)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["context=2,stage=2", "fsdp=2,tensor=2"])
@pytest.mark.parametrize("name", CHANGES)
def test_every_dtype_and_option_works_on_every_axis(name, mesh):
    config: Config = replace(equality.CONFIG, **CHANGES[name])
    row = equality.compare(mesh, config, 2, run_alone(name))
    exact = config.train.compute_dtype == "float32"
    assert row.loss_difference < (1e-5 if exact else 0.01)
    assert row.gradient_difference < (1e-5 if exact else 0.1)  # float16 and bfloat16 round after other sums
