"""Optimizers against optax's own and against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config.mesh import MeshConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.run import Config
from gptjax.parallel.mesh import make_mesh, traced_in
from gptjax.parallel.rules import shardings
from gptjax.training.muon import orthogonalize, scale_by_muon
from gptjax.training.optim import OPTIMIZERS, in_block_matrix, rate_factors
from gptjax.training.step import TrainState
from tests.tiny import (
    CONFIG,
    assert_trees_close,
    init_state,
    make_batch,
    make_step_without_model,
    replace,
    run_steps,
)

MUON = replace(
    CONFIG, optim={"name": "muon", "muon_learning_rate": 0.02, "embedding_rate": 4.0, "head_rate": 2.0},
    model={"tied_embeddings": False},
)  # fmt: skip


def test_the_table_and_the_config_name_the_same_optimizers():
    fields = {field.name: field.type for field in dataclasses.fields(OptimConfig)}
    assert set(OPTIMIZERS) == set(fields["name"].__args__)


def test_muons_first_update_is_that_of_optax():
    """Later ones differ: optax corrects the bias of Nesterov's two terms, each by another factor."""
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(1, 24, 24)), "float32")
    mine, _ = _muon_updates([gradient])
    numbers = {"w": optax.contrib.MuonDimensionNumbers(0, 1)}
    theirs = optax.contrib.scale_by_muon(beta=0.9, nesterov=True, weight_dimension_numbers=numbers)
    flat = {"w": gradient[0]}
    expected, _ = theirs.update(flat, theirs.init(flat), flat)
    np.testing.assert_allclose(mine[0], expected["w"], atol=2e-4)  # float32 sums in another order, five times


def test_muons_momentum_is_nesterovs():
    gradients = [jnp.asarray(np.random.default_rng(n).normal(size=(1, 8, 16)), "float32") for n in range(3)]
    found, _ = _muon_updates(gradients)
    momentum = np.zeros((1, 8, 16))
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * np.asarray(gradient)
    expected = orthogonalize(jnp.asarray(0.9 * momentum + 0.1 * np.asarray(gradients[-1]), "float32"))
    np.testing.assert_allclose(found, expected, atol=2e-4)


def _muon_updates(gradients):
    """The last update of one matrix, and the state after it."""
    muon, tree = scale_by_muon(0.9), lambda x: {"attn": {"w_out": x}}
    state, update = muon.init(tree(gradients[0])), None
    for gradient in gradients:
        update, state = muon.update(tree(gradient), state)
    return update["attn"]["w_out"], state


@pytest.mark.parametrize("shape", [(2, 6, 20), (2, 20, 6)])
def test_orthogonalizing_brings_singular_values_near_one_and_keeps_singular_vectors(shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for matrix, found in zip(x, np.asarray(orthogonalize(jnp.asarray(x))), strict=True):
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ found @ v.T
        assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-4
        assert (np.diag(inside) > 0.6).all() and (np.diag(inside) < 1.3).all()


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
@pytest.mark.parametrize("rank", [2, 16])
def test_five_steps_on_gram_matrices_are_five_newton_schulz_steps(shape, rank):
    """In float64, also of matrices with singular values near zero."""
    random = np.random.default_rng(3)
    x = random.normal(size=(shape[0], rank)) @ random.normal(size=(rank, shape[1]))
    x += 1e-3 * random.normal(size=shape)
    y = (x if shape[0] < shape[1] else x.T) / np.linalg.norm(x)
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    found = np.asarray(orthogonalize(jnp.asarray(x, "float32")))
    np.testing.assert_allclose(found, y if shape[0] < shape[1] else y.T, atol=2e-3)  # of singular values of about 1


def test_queries_keys_and_values_are_orthogonalised_apart_and_layers_too():
    random = np.random.default_rng(2)
    gradient = random.normal(size=(2, 16, 2, 4, 4)).astype(np.float32)  # two layers; two query heads of a key head
    gradient[1] *= 100.0
    gradient[:, :, :, 3] *= 50.0  # values
    gradients, muon = {"attn": {"w_qkv": jnp.asarray(gradient)}}, scale_by_muon(0.0)
    found, _ = muon.update(gradients, muon.init(gradients))
    found = np.asarray(found["attn"]["w_qkv"])
    for layer in range(2):
        for part in (slice(0, 2), slice(2, 3), slice(3, 4)):
            one = gradient[layer, :, :, part].reshape(16, -1)
            expected = np.asarray(orthogonalize(jnp.asarray(one)[None]))[0] * max(1, 16 / one.shape[1]) ** 0.5
            np.testing.assert_allclose(found[layer, :, :, part].reshape(16, -1), expected, atol=1e-4)


def test_muon_trains_the_matrices_of_blocks_and_adam_the_rest_each_at_its_rate():
    state, losses = run_steps(MUON, 8, make_batch())
    assert losses[-1] < losses[0] - 0.2
    factors = rate_factors(MUON, state.params)
    assert factors is not None
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): float(f)
            for p, f in jax.tree_util.tree_leaves_with_path(factors)}  # fmt: skip
    assert flat["embed/tokens"] == 4.0 and flat["head/w"] == 2.0 and flat["norm_f/scale"] == 1.0
    assert flat["blocks/mlp/w_in"] == pytest.approx(0.02 / 3e-3)
    names = [
        jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.params) if in_block_matrix(p)
    ]
    assert len(names) == 4, names
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    second = [jax.tree_util.keystr(path) for path, _ in moments if ".nu" in jax.tree_util.keystr(path)]
    assert second and not [name for name in second if "w_" in name and "blocks" in name], "muon has no second moments"


def test_adafactor_holds_vectors_in_place_of_second_moments():
    config = replace(CONFIG, optim={"name": "adafactor", "learning_rate": 1e-2}, model={"n_embd": 32})
    state, losses = run_steps(config, 8, make_batch())
    assert losses[-1] < losses[0] - 0.2
    matrices = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(state.params) if leaf.ndim > 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 0.5 * matrices


def after_steps(config: Config, steps: int, axes: dict | None = None) -> TrainState:
    """The state after some steps with gradients that need no model, on a mesh if `axes` are given."""
    step, where = make_step_without_model(config), None
    if axes is not None:
        mesh = make_mesh(MeshConfig(**axes))
        where = shardings(mesh, jax.eval_shape(lambda: init_state(config)))
        step = traced_in(mesh, step)
    state = jax.device_put(init_state(config), where)
    step = jax.jit(step, out_shardings=where and (where, None))
    for _ in range(steps):
        state, _ = step(state, None)
    return state


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_mesh_changes_nothing(name):
    config = replace(CONFIG, optim={"name": name}, model={"n_embd": 32})
    found, expected = after_steps(config, 1, {"data": 1, "fsdp": 2, "tensor": 2}), after_steps(config, 1)
    # Newton-Schulz steps enlarge float32 rounding.
    assert_trees_close(found.params, expected.params, atol=2e-5)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("muon", {"muon_learning_rate": 0.03}),
        ("muon", {"muon_beta": 0.5}),
        ("muon", {"embedding_rate": 9.0}),
        ("muon", {"head_rate": 9.0}),
        ("adafactor", {"factored_decay": 0.5}),
    ],
)
def test_every_option_of_an_optimizer_changes_its_result(base, change):
    config = MUON if base == "muon" else replace(CONFIG, optim={"name": base}, model={"n_embd": 32})
    assert total(replace(config, optim=change)) != total(config)


@functools.cache
def total(config: Config) -> list[float]:
    return [float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(after_steps(config, 3).params)]
