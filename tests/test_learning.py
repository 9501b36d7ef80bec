"""Schedule-free learning, the gradient noise scale, muP and ramps, each against its paper in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.pretraining import PackedWindows, cut_windows, read_windows
from gptjax.batches.ramps import sum_before, value_at
from gptjax.checkpoints.run_dir import load_run
from gptjax.config.mesh import MeshConfig
from gptjax.config.model import ModelConfig
from gptjax.config.optim import OptimConfig
from gptjax.errors import UserError
from gptjax.machine.chips import CHIPS
from gptjax.model.gpt import finish_logits
from gptjax.parallel.fits import check_fits
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.rules import shardings
from gptjax.planning.suggest import suggestions
from gptjax.training import trainer
from gptjax.training.noise import init_noise, update_noise
from gptjax.training.optim import make_optimizer, rate_factors
from gptjax.training.step import evaluated_params, make_gradient
from tests.test_batches import LENGTHS, make_split
from tests.tiny import (
    CONFIG,
    assert_trees_equal,
    final_state,
    init_params,
    init_state,
    make_batch,
    replace,
    rows,
    run_config,
    run_steps,
)

FREE = {"name": "schedule_free", "schedule": "constant", "min_learning_rate": 6e-5}


def test_schedule_free_is_the_algorithm_of_its_paper():
    """Algorithm 1 of arXiv:2405.15682: z descends, x averages it, gradients are taken at y."""
    config = OptimConfig(**FREE, beta1=0.9, beta2=0.8, weight_decay=0.3, grad_clip=0.0)
    random, rates = np.random.default_rng(0), np.array([0.1, 0.2, 0.3, 0.3, 0.3])
    optimizer = make_optimizer(config, lambda n: jnp.asarray(rates, "float32")[n])
    y = z = x = random.normal(size=(3, 4))
    nu, weights, params = np.zeros_like(y), 0.0, {"w_in": jnp.asarray(y, "float32")}
    state = optimizer.init(params)
    for n, rate in enumerate(rates):
        gradient = random.normal(size=y.shape)
        updates, state = optimizer.update({"w_in": jnp.asarray(gradient, "float32")}, state, params)
        params = jax.tree.map(lambda p, u: p - u, params, updates)
        nu = 0.8 * nu + 0.2 * gradient**2
        z = z - rate * (gradient / (np.sqrt(nu / (1 - 0.8 ** (n + 1))) + 1e-8) + 0.3 * y)
        weights += rates[: n + 1].max() ** 2
        share = rates[: n + 1].max() ** 2 / weights
        x = (1 - share) * x + share * z
        y = 0.1 * z + 0.9 * x
        np.testing.assert_allclose(params["w_in"], y, atol=2e-6)
        np.testing.assert_allclose((params["w_in"] - 0.1 * state[1].z["w_in"]) / 0.9, x, atol=2e-6)


def test_schedule_free_evaluates_the_average_and_learns():
    state, losses = run_steps(replace(CONFIG, optim=FREE | {"learning_rate": 1e-2}), 8, make_batch())
    assert losses[-1] < losses[0] - 0.2
    leaf = evaluated_params(state)["blocks"]["mlp"]["w_in"]
    expected = (state.params["blocks"]["mlp"]["w_in"] - 0.1 * state.opt_state[1].z["blocks"]["mlp"]["w_in"]) / 0.9
    np.testing.assert_allclose(leaf, expected, atol=1e-6)
    assert float(jnp.abs(leaf - state.params["blocks"]["mlp"]["w_in"]).max()) > 1e-4
    assert shardings(make_mesh(MeshConfig()), state) is not None  # every leaf has a rule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "schedule_free"}, "set optim.schedule=constant"),
        (FREE | {"beta1": 0.0}, "must lie above 0"),
        (FREE | {"embedding_rate": 2.0}, "embedding_rate=2.0 has no effect"),
    ],
)
def test_schedule_free_refuses_what_it_does_not_use(options, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**options)


def test_schedule_free_does_not_go_with_another_average():
    with pytest.raises(UserError, match=r"ema=0.9 has no effect"):
        replace(CONFIG, optim=FREE, train={"ema": 0.9})


def test_the_noise_scale_of_known_gradients_is_found():
    """Gradients of single sequences with mean g and covariance of trace 32 n."""
    random, g = np.random.default_rng(0), np.full(32, 0.5)
    noise, trace = init_noise(), 32 * 4.0
    for _ in range(400):
        one = g + 2.0 * random.normal(size=(4, 8, 32))  # 4 micro-batches of 8 sequences
        small = np.mean(np.sum(one.mean(1) ** 2, axis=-1))
        large = np.sum(one.mean((0, 1)) ** 2)
        noise = update_noise(noise, jnp.bool_(True), jnp.float32(small), jnp.float32(large), (8, 32))
    assert float(noise.scale) == pytest.approx(trace / np.sum(g**2), rel=0.15)  # a mean over about 50 steps
    rejected = update_noise(noise, jnp.bool_(False), jnp.float32(jnp.nan), jnp.float32(jnp.nan), (8, 32))
    assert float(rejected.scale) == float(noise.scale)


@pytest.mark.slow
def test_the_noise_scale_compares_micro_batches_with_the_batch():
    config = replace(CONFIG, train={"noise_scale": True, "micro_batch_size": 4})
    batch, state = make_batch(2), init_state(config)
    after, _ = run_steps(config, 1, batch)
    gradient = jax.jit(make_gradient(CONFIG))
    norms = []
    for part in (jax.tree.map(lambda x: x[:1], batch), jax.tree.map(lambda x: x[1:], batch), batch):
        _, grads = gradient(state, part)
        norms.append(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(grads)))
    small, large = (norms[0] + norms[1]) / 2, norms[2]
    assert after.noise is not None
    np.testing.assert_allclose(after.noise.square, (8 * large - 4 * small) / 4 / 50, rtol=1e-3)
    np.testing.assert_allclose(after.noise.trace, (small - large) / (1 / 4 - 1 / 8) / 50, rtol=1e-3)
    with pytest.raises(UserError, match=r"set train.micro_batch_size to less than"):
        replace(CONFIG, train={"noise_scale": True})


# Table 8 of arXiv:2203.03466, in powers of the width: standard deviation at the start, Adam's learning rate.
MUP = {"blocks/attn/w_qkv": (-0.5, -1), "blocks/attn/w_out": (-0.5, -1), "blocks/mlp/w_in": (-0.5, -1),
       "blocks/mlp/w_out": (-0.5, -1), "embed/tokens": (0, 0), "embed/positions": (0, 0), "head/w": (0, 0),
       "blocks/mlp/b_in": (0, 0), "norm_f/scale": (0, 0)}  # fmt: skip


def test_mup_scales_each_parameter_as_the_papers_table():
    base = ModelConfig(vocab_size=64, block_size=64, n_layer=1, n_head=2, n_embd=16, mup_base_width=16,
                       tied_embeddings=False)  # fmt: skip
    wide = dataclasses.replace(base, n_embd=64, n_head=8)
    drawn = [init_params(model, jax.random.key(0)) for model in (base, wide)]
    factors = rate_factors(replace(CONFIG, model=dataclasses.asdict(wide) | {"adapter": wide.adapter}), drawn[1])
    assert factors is not None and rate_factors(dataclasses.replace(CONFIG, model=base), drawn[0]) is None
    for name, (std, rate) in MUP.items():
        leaves = []
        for tree in (*drawn, factors):
            for key in name.split("/"):
                tree = tree[key]
            leaves.append(tree)
        small, large, factor = leaves
        if float(jnp.std(small)):
            assert float(jnp.std(large) / jnp.std(small)) == pytest.approx(4.0**std, rel=0.1), name
        assert float(factor) == pytest.approx(4.0**rate), name
    logits = jnp.arange(4.0)
    np.testing.assert_allclose(finish_logits(wide, {}, logits), logits / 4, rtol=1e-6)


def test_mup_leaves_the_updates_of_muon_alone():
    config = replace(CONFIG, optim={"name": "muon", "muon_learning_rate": 0.03}, model={"mup_base_width": 4})
    factors = rate_factors(config, init_params(config.model, jax.random.key(0)))
    assert factors is not None
    assert float(factors["blocks"]["mlp"]["w_in"]) == pytest.approx(0.03 / config.optim.learning_rate)


RAMP = ((0, 2), (3, 4), (5, 8))


def test_a_ramp_goes_through_the_same_windows_one_after_another():
    packed = PackedWindows(make_split(LENGTHS), 8, 0, False, ramp=RAMP)
    plain, first = dataclasses.replace(packed, ramp=()), 0
    for step in range(8):
        size = value_at(RAMP, step)
        assert first == sum_before(RAMP, step)
        batch, documents = packed.batch(step, 8), packed.documents(step, 8)
        expected = plain.windows(np.arange(first, first + size))
        assert_trees_equal(batch, expected)
        assert documents == [pair for n in range(first, first + size) for pair in plain.documents_of(n)]
        assert_trees_equal(packed.batch(step, 8, np.arange(1, size)), jax.tree.map(lambda x: x[1:], expected))
        first += size


@pytest.mark.parametrize("lengths", [LENGTHS, [150]], ids=["several", "one"])
def test_pieces_of_windows_are_shorter_windows_of_the_same_stream(lengths):
    packed = PackedWindows(make_split(lengths), 8, 0, False)
    short, numbers = dataclasses.replace(packed, block_size=4), np.arange(6)
    pieces, starts = cut_windows(packed.windows(numbers), 4), packed.starts(numbers)
    for number, start in enumerate(np.stack([starts, starts + 4], axis=1).reshape(-1)):
        expected = read_windows(short.split, [start], 4, False)
        for name in ("inputs", "targets", "positions"):
            np.testing.assert_array_equal(getattr(pieces, name)[number], getattr(expected, name)[0], err_msg=name)
        if expected.segments is not None:  # only equality of segments counts
            shifted = pieces.segments[number] - pieces.segments[number, 0]
            np.testing.assert_array_equal(shifted, expected.segments[0])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch_ramp": ("0:2", "3:4")}, "must ascend to train.batch_size=8"),
        ({"batch_ramp": ("1:2", "3:8")}, "must ascend from 0"),
        ({"batch_ramp": ("0:2", "3:x")}, "must be like 500:16"),
        ({"batch_ramp": ("0:3", "3:8"), "micro_batch_size": 4}, "divisible by train.micro_batch_size=4"),
        ({"length_ramp": ("0:5", "3:16")}, "5 tokens must divide model.block_size=16"),
    ],
)
def test_a_wrong_ramp_is_named(train, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, train=train)


def test_every_size_of_a_ramp_must_fit_the_mesh():
    mesh = make_mesh(MeshConfig(data=4))
    check_fits(replace(CONFIG, train={"batch_ramp": ("0:4", "3:8")}), mesh)
    with pytest.raises(UserError, match="batch_ramp: 2 sequences, from step 0 on, must be divisible by the 4 devices"):
        check_fits(replace(CONFIG, train={"batch_ramp": ("0:2", "3:8")}), mesh)


def test_a_plan_suggests_micro_batches_that_divide_every_size_of_a_ramp():
    config = replace(CONFIG, train={"batch_ramp": ("0:4", "3:8")})
    found = suggestions(config, CHIPS["h100"], 2, 1e9, 1.0, 1e12)
    assert found and {4 % one.train.micro_batch for one in found} == {0}


@pytest.mark.slow
def test_a_run_with_ramps_and_averages_resumes_exactly(tmp_path):
    train = {"batch_ramp": ("0:4", "4:8"), "length_ramp": ("0:16", "4:32"), "noise_scale": True}
    train |= {"micro_batch_size": 4, "eval_every": 0, "log_every": 1}
    config = run_config(tmp_path, optim=FREE, train=train, model={"n_layer": 1})
    other = dataclasses.replace(config, run_dir=str(tmp_path / "other"))
    assert trainer.train(config) == 0
    for steps in (3, 6):
        assert trainer.train(replace(other, train={"num_steps": steps})) == 0
    (state, _), (resumed, _) = final_state(config), final_state(other)
    assert_trees_equal(state, resumed)
    logged = [row for row in rows(config) if "loss" in row]
    assert [row["tokens"] for row in logged] == [128, 256, 384, 512, 768, 1024]
    assert [row["targets"] for row in logged] == [128, 128, 128, 128, 256, 256]
    assert all(row["noise_scale"] is None or np.isfinite(row["noise_scale"]) for row in logged)
    assert_trees_equal(load_run(tmp_path / "run", "latest").params, evaluated_params(state))
