"""Properties of the training step: what it averages, what it logs, and that no two places share a dropout mask."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config.optim import OptimConfig
from gptjax.model import gpt
from gptjax.model.gpt import Compute
from gptjax.model.inputs import BlockInputs
from gptjax.model.loss import batch_loss
from gptjax.ops.attention_spec import Mask
from gptjax.ops.cross_entropy import LossOptions
from gptjax.training.optim import make_optimizer
from gptjax.training.precision import LossScale
from gptjax.training.schedules import make_schedule
from gptjax.training.step import evaluated_params
from tests.tiny import (
    CONFIG,
    MODEL,
    assert_trees_close,
    assert_trees_equal,
    hidden_states,
    init_params,
    init_state,
    make_batch,
    replace,
    train_step,
)

KEY = jax.random.key(0)
DROPS = replace(CONFIG, model={"dropout": 0.5})


def test_documents_packed_together_have_the_loss_that_they_have_alone():
    lengths, T = [6, 7, 3], MODEL.block_size
    params = jax.tree.map(lambda p: 8 * p, init_params(MODEL, KEY))  # large, so that positions and context matter
    texts = [np.random.default_rng(n).integers(0, MODEL.vocab_size, n + 1).astype(np.int32) for n in lengths]

    def row(documents):
        """Documents one after another in a row `[1, T]`; what is left over has no targets."""
        fill = T - sum(len(document) - 1 for document in documents)
        parts = [(d[:-1], d[1:], np.full(len(d) - 1, n), np.arange(len(d) - 1)) for n, d in enumerate(documents)]
        parts.append((np.zeros(fill), np.full(fill, -1), np.full(fill, len(documents)), np.arange(fill)))
        return [np.concatenate(arrays).astype(np.int32)[None] for arrays in zip(*parts, strict=True)]

    batch_type = type(make_batch())
    packed = batch_type(*row(texts))
    alone = batch_type(*map(np.concatenate, zip(*(row([text]) for text in texts), strict=True)))
    alone = alone._replace(segments=None)
    loss = jax.jit(lambda batch: batch_loss(MODEL, LossOptions(MODEL.vocab_size), Compute(), params, batch, None))
    together, apart = loss(packed), loss(alone)
    assert together.count == apart.count == sum(lengths)
    np.testing.assert_allclose(together.nll, apart.nll, rtol=1e-6)


def mean_loss(params, batch):
    """The mean over targets of minus the log-probability, written out."""
    batch = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    x_BTD = hidden_states(MODEL, params, batch.inputs, batch.positions, batch.segments)
    log_p_BTV = jax.nn.log_softmax(x_BTD @ params["embed"]["tokens"].T)
    nll_BT = -jnp.take_along_axis(log_p_BTV, jnp.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(nll_BT, where=batch.targets >= 0) / jnp.sum(batch.targets >= 0)


def test_the_update_is_that_of_the_gradient_of_the_mean():
    state, batch = init_state(CONFIG), make_batch()
    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params, batch)
    assert float(optax.tree.norm(grads)) < CONFIG.optim.grad_clip, "clipping would hide a wrong scale"
    after, metrics = train_step(CONFIG)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    moments = optax.tree.get(after.opt_state, "mu")
    assert_trees_close(moments, jax.tree.map(lambda g: (1 - CONFIG.optim.beta1) * g, grads), atol=2e-8)


@pytest.mark.parametrize("how", ["more rows", "more micro-batches"])
def test_repeated_rows_change_neither_the_norm_nor_the_update(how):
    state, batch = init_state(CONFIG), make_batch(batch_size=4)
    axis = 1 if how == "more rows" else 0
    repeated = jax.tree.map(lambda x: np.concatenate([x] * (2 if axis else 4), axis=axis), batch)
    (once, metrics), (again, more) = (train_step(CONFIG)(state, b) for b in (batch, repeated))
    assert more["targets"] == (2 if axis else 4) * metrics["targets"]
    np.testing.assert_allclose(more["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(more["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    assert_trees_close(optax.tree.get(again.opt_state, "mu"), optax.tree.get(once.opt_state, "mu"), atol=1e-8)


def test_float16_updates_do_not_depend_on_the_scale():
    config = replace(CONFIG, train={"compute_dtype": "float16"})
    start, batch = init_state(config), make_batch()
    _, exact = train_step(CONFIG)(init_state(CONFIG), batch)
    norms, moments = [], []
    for power in (6, 10, 14):
        state = dataclasses.replace(start, loss_scale=LossScale(jnp.float32(2.0**power), jnp.int32(0)))
        after, metrics = train_step(config)(state, batch)
        assert metrics["loss_scale"] == 2.0**power and not metrics["skipped"]
        norms.append(float(metrics["grad_norm"]))
        moments.append(optax.tree.get(after.opt_state, "mu"))
    np.testing.assert_allclose(norms, float(exact["grad_norm"]), rtol=5e-3)  # 11 bits, and small numbers with fewer
    for other in moments[1:]:
        assert_trees_close(other, moments[0], atol=2e-6)


@pytest.mark.parametrize("train", [{"label_smoothing": 0.1}, {"z_loss": 0.1}])
def test_the_logged_loss_is_without_what_is_added_to_the_objective(train):
    batch = make_batch()
    (_, plain), (_, other) = (train_step(c)(init_state(c), batch) for c in (CONFIG, replace(CONFIG, train=train)))
    np.testing.assert_allclose(other["loss"], plain["loss"], rtol=1e-6)
    assert abs(float(other["grad_norm"] / plain["grad_norm"]) - 1) > 1e-3, "the gradient is that of the objective"


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_optimizers_are_those_of_optax(name, clip):
    betas = {"beta1": 0.8, "beta2": 0.9} | ({"eps": 1e-3} if name == "adamw" else {})
    ours = make_optimizer(OptimConfig(name=name, weight_decay=0.1, grad_clip=clip, **betas))
    mask = {"w_in": True, "b_in": False}
    theirs = {
        "adamw": optax.adamw(1e-2, 0.8, 0.9, 1e-3, weight_decay=0.1, mask=mask),
        "lion": optax.lion(1e-2, 0.8, 0.9, weight_decay=0.1, mask=mask),
    }[name]
    theirs = optax.chain(optax.clip_by_global_norm(clip) if clip else optax.identity(), theirs)
    params = expected = {"w_in": jnp.arange(6.0).reshape(2, 3), "b_in": jnp.ones(3)}
    state, expected_state = ours.init(params), theirs.init(params)
    for step in range(5):  # gradients change their signs and their sizes, so that moments and bias correction matter
        grads = jax.tree.map(lambda p, step=step: jnp.cos(p * (step + 1)) * 2.0**step, params)
        updates, state = ours.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - 1e-2 * u, params, updates)
        more, expected_state = theirs.update(grads, expected_state, expected)
        expected = optax.apply_updates(expected, more)
    assert_trees_close(params, expected, rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_wsd_decays_over_its_share_of_the_steps(fraction):
    config = OptimConfig(
        learning_rate=1.0, min_learning_rate=0.25, warmup_steps=5, schedule="wsd", wsd_decay_fraction=fraction
    )
    schedule = make_schedule(config, 100)
    rates = np.array([float(schedule(jnp.int32(n))) for n in (4, 5, 50, 60, 75, 80, 90, 100)])
    start = 100 - 100 * fraction
    expected = [1.0 - 0.75 * max(0, (n - start) / (100 - start)) for n in (5, 50, 60, 75, 80, 90, 100)]
    np.testing.assert_allclose(rates, [5 / 6, *expected], rtol=1e-6)


def masks(rate: float, key: jax.Array) -> np.ndarray:
    """What dropout keeps at its places in a model of two layers, `[5, B, T, D]` of 0 and 1: the embedding, then what
    attention and MLP of each layer add.

    Each place adds a power of two to a residual stream in which nothing else is, so the sum tells what was kept.
    """
    model = dataclasses.replace(MODEL, dropout=rate)
    params = jax.tree.map(jnp.zeros_like, init_params(model, KEY))
    params["embed"]["tokens"] += 1.0
    for bit, (part, layer) in enumerate(itertools.product(("attn", "mlp"), range(2)), 1):
        params["blocks"][part]["b_out"] = params["blocks"][part]["b_out"].at[layer].set(2.0**bit)
    batch = make_batch()
    inputs, positions = batch.inputs[0], batch.positions[0]

    @jax.jit
    def stream(params):
        x_BTD = gpt.embed_tokens(model, params, inputs, positions, key=key)
        return gpt.apply_blocks(model, params, x_BTD, BlockInputs(positions), key=key)[0]

    scaled = np.asarray(stream(params), np.float64) * (1 - rate)
    sums = np.rint(scaled).astype(int)
    np.testing.assert_allclose(scaled, sums, atol=1e-3)  # the rate is rounded to 16 bits
    return np.stack([sums >> bit & 1 for bit in range(5)])


def test_dropout_has_its_rate_at_every_place_and_no_two_places_share_a_mask():
    rate = 0.25
    kept, other = masks(rate, jax.random.key(1)), masks(rate, jax.random.key(2))
    np.testing.assert_allclose(kept.mean(axis=(1, 2, 3)), 1 - rate, atol=0.05)  # 2,048 elements: deviation 0.01
    independent = rate**2 + (1 - rate) ** 2
    for a, b in [*itertools.combinations(kept, 2), *zip(kept, other, strict=True)]:
        assert np.mean(a == b) == pytest.approx(independent, abs=0.06)


def test_attention_weights_are_dropped_at_their_rate_and_otherwise_in_each_layer():
    """Every token is a document of its own, so a head gives its value where its only weight stays, and else zero."""
    rate, (B, T) = 0.25, make_batch().inputs[0].shape
    model = dataclasses.replace(MODEL, dropout=rate)
    params = jax.tree.map(jnp.zeros_like, init_params(model, KEY))
    attention = params["blocks"]["attn"]
    attention["b_qkv"] = attention["b_qkv"].at[:, :, -1].set(1.0)  # all values
    attention["w_out"] = jnp.stack([bit * jnp.eye(MODEL.n_embd) for bit in (1, 2)])  # layers add 1 or 2
    segments = jnp.broadcast_to(jnp.arange(T), (B, T))
    inputs = BlockInputs(0 * segments, Mask(segments))

    @jax.jit
    def stream(params):
        return gpt.apply_blocks(model, params, jnp.zeros((B, T, MODEL.n_embd)), inputs, key=KEY)[0]

    sums = np.rint(np.asarray(stream(params)) * (1 - rate) ** 2).astype(int)
    heads = sums.reshape(B, T, MODEL.n_head, -1)
    kept = np.stack([(heads >> bit & 1).any(axis=-1) for bit in range(2)])  # what a layer adds is dropped too
    np.testing.assert_allclose(kept.mean(axis=(1, 2, 3)), 1 - rate, atol=0.08)  # 256 weights: deviation 0.03
    assert np.mean(kept[0] == kept[1]) == pytest.approx(rate**2 + (1 - rate) ** 2, abs=0.12)
    assert np.mean(kept[:, :, :, 0] == kept[:, :, :, 1]) < 0.9, "heads drop weights of their own"


def test_dropout_differs_from_step_to_step():
    state, batch = init_state(DROPS), make_batch()
    losses = {
        float(train_step(DROPS)(dataclasses.replace(state, step=jnp.int32(step)), batch)[1]["loss"])
        for step in (0, 1, 2, 2)
    }
    assert len(losses) == 3


def test_dropout_differs_between_micro_batches():
    state, one = init_state(DROPS), make_batch()
    two = jax.tree.map(lambda x: np.concatenate([x, x]), one)
    losses = [float(train_step(DROPS)(state, batch)[1]["loss"]) for batch in (one, two)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)  # equal masks would give the mean of equal losses


def test_evaluation_takes_the_average_of_the_parameters():
    state = init_state(replace(CONFIG, train={"ema": 0.9}))
    average = jax.tree.map(lambda p: p + 1, state.params)
    assert_trees_equal(evaluated_params(dataclasses.replace(state, ema=average)), average)
    assert_trees_equal(evaluated_params(dataclasses.replace(state, ema=None)), state.params)
