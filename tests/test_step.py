import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.mesh import MeshConfig
from gptjax.config.optim import OptimConfig
from gptjax.errors import UserError
from gptjax.parallel.mesh import batch_sharding, make_mesh, traced_in
from gptjax.parallel.rules import shardings
from gptjax.training.optim import decayed
from gptjax.training.precision import GROW_AFTER, LossScale, next_loss_scale
from gptjax.training.schedules import make_schedule
from gptjax.training.step import make_train_step
from tests.tiny import (
    CONFIG,
    MODEL,
    assert_trees_close,
    assert_trees_equal,
    init_state,
    make_batch,
    make_step_without_model,
    replace,
    run_steps,
    train_step,
)


def test_first_loss_is_that_of_guessing_and_falls_on_a_repeated_batch():
    _, losses = run_steps(CONFIG, 20, make_batch())
    assert losses[0] == pytest.approx(np.log(MODEL.vocab_size), abs=0.05)
    assert losses[-1] < 0.9 * losses[0]


def test_step_does_not_depend_on_how_the_batch_is_cut():
    (whole, metrics), (cut, cut_metrics) = (train_step(CONFIG)(init_state(CONFIG), make_batch(M)) for M in (1, 4))
    np.testing.assert_allclose(cut_metrics["loss"], metrics["loss"], rtol=1e-6)
    # Adam's first update is the gradient's sign times the learning rate, so what is compared is the moments.
    assert_trees_close(cut.opt_state, whole.opt_state, atol=1e-7)
    assert_trees_close(cut.params, whole.params, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(2, 1, 2), (1, 2, 2)])  # test_parallel.py has others
def test_step_does_not_depend_on_the_mesh(axes):
    config = replace(CONFIG, model={"dropout": 0.1})
    batch = make_batch(2)
    expected, metrics = train_step(config)(init_state(config), batch)
    mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), axes, strict=True))))
    where = shardings(mesh, jax.eval_shape(lambda: init_state(config)))
    state = jax.jit(lambda: init_state(config), out_shardings=where)()
    step = jax.jit(traced_in(mesh, make_train_step(config)), out_shardings=(where, None))
    actual, sharded_metrics = step(state, jax.device_put(batch, batch_sharding(mesh, 1)))
    np.testing.assert_allclose(sharded_metrics["loss"], metrics["loss"], rtol=1e-6)
    for array, sharding in zip(jax.tree.leaves(actual), jax.tree.leaves(where), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    assert_trees_close(jax.device_get(actual.opt_state), jax.device_get(expected.opt_state), atol=1e-7)


def test_fsdp_cuts_the_state():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    where = shardings(mesh, jax.eval_shape(lambda: init_state(CONFIG)))
    state = jax.jit(lambda: init_state(CONFIG), out_shardings=where)()
    leaves = jax.tree.leaves(state)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert held < 0.3 * sum(leaf.nbytes for leaf in leaves)  # a quarter, and what is too small to cut


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"mesh.data=3 does not match 4 device.*set mesh.data=-1"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(UserError, match=r"mesh.data=2 x mesh.stage=4 does not match 4 device.*the axes need 8"):
        make_mesh(MeshConfig(data=2, stage=4))
    mesh = make_mesh(MeshConfig(fsdp=4))
    with pytest.raises(UserError, match=r"mesh.fsdp=4 does not divide 18, a dimension of params/blocks/"):
        shardings(mesh, jax.eval_shape(lambda: init_state(replace(CONFIG, model={"n_embd": 18}))))


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule matches 'strange'"):
        shardings(make_mesh(MeshConfig()), {"strange": jnp.zeros(3)})


def test_decay_spares_biases_and_norms():
    paths = jax.tree_util.tree_leaves_with_path(decayed(init_state(CONFIG).params))
    spared = {path[-1].key for path, decays in paths if not decays}
    assert spared == {"scale", "bias", "b_in", "b_out", "b_qkv"}


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules(name):
    extra = {} if name == "constant" else {"min_learning_rate": 0.1}
    schedule = make_schedule(OptimConfig(learning_rate=1.0, warmup_steps=10, schedule=name, **extra), 110)
    rates = np.array([float(schedule(jnp.int32(n))) for n in range(111)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 11, rtol=1e-6)
    half, end = {"cosine": (0.55, 0.1), "linear": (0.55, 0.1), "wsd": (1.0, 0.1), "constant": (1.0, 1.0)}[name]
    np.testing.assert_allclose([rates[10], rates[60], rates[110]], [1.0, half, end], rtol=1e-5)
    if name == "wsd":
        np.testing.assert_allclose(rates[[88, 99]], [1.0, 0.55], rtol=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count():
    state = init_state(CONFIG)
    broken = dataclasses.replace(state, params=jax.tree.map(lambda p: p.at[0].set(jnp.nan), state.params))
    after, metrics = train_step(CONFIG)(broken, make_batch())
    assert not np.isfinite(metrics["grad_norm"])
    assert (int(after.step), int(after.skipped)) == (1, 1)
    assert_trees_equal(after.params, broken.params)
    assert_trees_equal(after.opt_state, broken.opt_state)


def test_loss_scale_grows_after_many_good_steps():
    scale = LossScale(jnp.float32(8.0), jnp.int32(GROW_AFTER - 1))
    grown = next_loss_scale(scale, jnp.bool(True))
    assert (grown.scale, grown.good_steps) == (16.0, 0)
    halved = next_loss_scale(scale, jnp.bool(False))
    assert (halved.scale, halved.good_steps) == (4.0, 0)


def test_ema_is_the_average_of_the_parameters():
    config = replace(CONFIG, train={"ema": 0.9})
    state = init_state(config)
    expected = state.params
    for _ in range(3):
        state, _ = train_step(config)(state, make_batch())
        expected = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, expected, state.params)
    assert_trees_close(state.ema, expected, atol=1e-7)


def test_the_compiled_step_does_not_copy_the_moments():
    state = jax.eval_shape(lambda: init_state(CONFIG))
    text = jax.jit(make_train_step(CONFIG), donate_argnums=0).lower(state, make_batch()).compile().as_text()
    assert "opt_state" in text
    copies = [line for line in text.splitlines() if re.search(r" copy\(%\S*(mu|nu)__blocks", line)]
    assert not copies


FLIPS = [
    {"seed": 1},
    *({"model": change} for change in ({"dropout": 0.5}, {"bias": False}, {"tied_embeddings": False})),
    *({"model": change} for change in ({"n_layer": 1}, {"n_head": 4}, {"n_kv_head": 1}, {"n_embd": 32})),
    *({"model": change} for change in ({"vocab_size": 65}, {"vocab_multiple": 5}, {"block_size": 17})),
    {"model": {"attention_window": 3}},
    *({"optim": change} for change in ({"name": "lion"}, {"learning_rate": 1e-3}, {"warmup_steps": 0})),
    *({"optim": change} for change in ({"schedule": "linear"}, {"min_learning_rate": 0.0}, {"weight_decay": 0.5})),
    *({"optim": change} for change in ({"beta1": 0.5}, {"beta2": 0.5}, {"eps": 1e-2}, {"grad_clip": 0.01})),
    *({"train": change} for change in ({"label_smoothing": 0.1}, {"z_loss": 0.1}, {"ema": 0.9})),
    *({"train": change} for change in ({"compute_dtype": "bfloat16"}, {"param_dtype": "bfloat16"}, {"num_steps": 9})),
]


@functools.cache
def fingerprint(config, start, through_model=True):
    """Shapes, dtypes and squares of the parameters and their average after four steps."""
    take_step = train_step(config) if through_model else jax.jit(make_step_without_model(config))
    state = init_state(start)
    for _ in range(4):
        state, _ = take_step(state, make_batch())
    leaves = jax.tree.leaves([state.params, state.ema])
    return [(leaf.shape, str(leaf.dtype), float(jnp.sum(leaf.astype(jnp.float32) ** 2))) for leaf in leaves]


@pytest.mark.parametrize("change", FLIPS, ids=str)
def test_every_option_of_the_step_changes_its_result(change):
    config = replace(CONFIG, **change)
    fields = {field for name, section in change.items() if name != "seed" for field in section}
    after_gradient = "optim" in change or fields & {"ema", "num_steps"}  # then any gradient will do
    start = CONFIG if "optim" in change and "name" not in fields else config
    assert fingerprint(config, start, not after_gradient) != fingerprint(CONFIG, CONFIG, not after_gradient)
