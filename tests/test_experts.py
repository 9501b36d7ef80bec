"""The router's losses, its capacity, and how they reach objective and metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.config.mesh import MeshConfig
from gptjax.config.model import ModelConfig
from gptjax.errors import UserError
from gptjax.model.experts import Experts
from gptjax.model.gpt import Compute
from gptjax.model.loss import batch_loss, loss_options
from gptjax.parallel.fits import check_fits
from gptjax.parallel.mesh import batch_sharding, make_mesh, traced_in
from gptjax.parallel.rules import shardings
from tests.tiny import (
    CONFIG,
    assert_trees_close,
    init_params,
    init_state,
    make_batch,
    replace,
    run_steps,
    train_step,
)

MODEL = ModelConfig(
    vocab_size=37, block_size=16, n_layer=1, n_head=2, n_embd=8, bias=False, n_expert=4, experts_per_token=2,
    expert_width=12,
)  # fmt: skip
MOE = replace(CONFIG, model={"n_expert": 4, "bias": False, "router_z_loss": 0.1, "balance_loss": 0.5})


def layer_of(config: ModelConfig) -> Experts:
    return Experts(config, rngs=nnx.Rngs(0))


def test_the_losses_of_the_router_are_those_of_the_papers():
    x_BTD = jax.random.normal(jax.random.key(1), (2, 16, 8))
    layer = layer_of(MODEL)
    _, extras = layer(x_BTD)
    logits = np.asarray(x_BTD.reshape(-1, 8), np.float64) @ np.asarray(layer.w_router[...], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sent = np.zeros(4)
    for row in probabilities:
        sent[np.argsort(-row)[:2]] += 1
    balance = 4 * np.sum(sent / sent.sum() * probabilities.mean(0))
    np.testing.assert_allclose(extras["balance_loss"], balance, rtol=1e-5)
    np.testing.assert_allclose(extras["router_z_loss"], np.mean(np.log(np.exp(logits).sum(-1)) ** 2), rtol=1e-5)


def test_an_expert_that_is_full_drops_later_tokens_and_counts_them():
    config = dataclasses.replace(MODEL, expert_capacity=0.5, experts_per_token=1)
    layer = layer_of(config)
    x_1TD = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (8,)), (1, 16, 8))  # all want the same expert
    y_1TD, extras = layer(x_1TD)
    assert extras["dropped_assignments"] == pytest.approx(14 / 16)  # room: 0.5 * 16 / 4 = 2
    assert (y_1TD[0, :2] != 0).all() and (y_1TD[0, 2:] == 0).all()


@pytest.mark.slow
def test_objective_and_metrics_hold_the_routers_losses_whatever_the_micro_batches():
    results = []
    for count in (1, 4):
        batch = make_batch(count)
        batch = batch._replace(targets=batch.inputs)  # as many in each micro-batch, so that their means weigh the same
        _, metrics = train_step(MOE)(init_state(MOE), batch)
        results.append({name: float(metrics[name]) for name in ("loss", "grad_norm", "router_z_loss", "balance_loss")})
        assert results[-1]["balance_loss"] == pytest.approx(1.0, abs=0.2), "1 where experts are used evenly"
    for name in ("loss", "router_z_loss"):  # means over tokens; the balance of a micro-batch is its own
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5), name


def test_the_weights_of_the_routers_losses_change_what_is_learned():
    def routers(config):
        state, losses = run_steps(config, 5, make_batch())
        return np.asarray(state.params["blocks"]["experts"]["w_router"]), losses

    base, losses = routers(MOE)
    assert losses[-1] < losses[0]
    for change in ({"router_z_loss": 0.0}, {"balance_loss": 0.0}):
        assert (routers(replace(MOE, model=change))[0] != base).any()


@pytest.mark.parametrize("capacity", [0.0, pytest.param(1.5, marks=pytest.mark.slow)])
def test_experts_on_several_devices_learn_the_same(capacity):
    """Losses and gradients are those of one device, and each device has its own experts only."""
    config = dataclasses.replace(MODEL, expert_capacity=capacity, gated=True, n_embd=16)
    params, batch = init_params(config, jax.random.key(0)), make_batch(1, 4, config)
    batch = jax.tree.map(lambda x: x[0] % 37, batch)

    def objective(params, batch):
        loss = batch_loss(config, loss_options(config), Compute(unroll=1), params, batch, None)
        return loss.nll + 0.01 * sum(loss.extras.values())

    mesh = make_mesh(MeshConfig(data=1, expert=2, tensor=2))
    where = shardings(mesh, params)
    placed = jax.device_put(params, where)
    for name in ("w_in", "w_gate", "w_out"):
        leaf = placed["blocks"]["experts"][name]
        assert leaf.addressable_shards[0].data.size == leaf.size // 4
    expected, gradients = jax.jit(jax.value_and_grad(objective))(params, batch)
    sharded = jax.jit(traced_in(mesh, jax.value_and_grad(objective)), out_shardings=(None, where))
    found, sharded_gradients = sharded(placed, jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert_trees_close(jax.device_get(sharded_gradients), gradients, atol=1e-5 * float(expected))
    with pytest.raises(UserError, match=r"mesh.expert=2 does not divide model.n_expert=0"):
        check_fits(CONFIG, mesh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_expert": 0}, "expert_width=12 has no effect without model.n_expert"),
        ({"experts_per_token": 5}, "experts_per_token=5 must be at most model.n_expert=4"),
        ({"bias": True}, "needs model.bias=false"),
    ],
)
def test_options_of_experts_that_do_not_apply_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(MODEL, **change)
