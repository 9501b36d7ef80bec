import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.labelled import TextBatch
from gptjax.batches.pretraining import Batch
from gptjax.config.task import LORA_TARGETS, AdapterConfig, TaskConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.decode import stream
from gptjax.generation.request import Request
from gptjax.generation.weights import decoding_weights
from gptjax.machine.native import build
from gptjax.model import gpt, loss
from gptjax.model.adapters import merge_lora
from gptjax.model.cache import init_cache
from gptjax.model.gpt import Compute, logits
from gptjax.model.heads import init_head, label_loss, multi_label_loss, pool
from tests.tiny import MODEL, assert_trees_equal, extend, hidden_states, init_params

label_logits = jax.jit(loss.label_logits, static_argnums=(0, 1, 2, 4))

KEY = jax.random.key(0)
ADAPTERS = {
    "lora": AdapterConfig(kind="lora", rank=4, alpha=6.0, targets=LORA_TARGETS),
    "bottleneck": AdapterConfig(kind="bottleneck", rank=4),
    "prompt": AdapterConfig(kind="prompt", tokens=3),
    "prefix": AdapterConfig(kind="prefix", tokens=3),
}
ACROSS_LAYERS = {
    **{"value_residual": True, "learned_skips": True, "residual_mix": True, "positions": "rope"},
    **{"attention_pattern": ("strided", "local"), "attention_stride": 3, "attention_window": 4, "attention_sinks": 2},
}
TOKENS = jax.random.randint(KEY, (3, 10), 0, MODEL.vocab_size)
POSITIONS = jnp.broadcast_to(jnp.arange(10), TOKENS.shape)


def adapted(kind: str, drawn: bool = True, change: dict | None = None):
    """A model with an adapter over the weights that it would have without; `drawn`: none of it is zero."""
    plain = dataclasses.replace(MODEL, **(change or {}))
    model = dataclasses.replace(plain, adapter=ADAPTERS[kind])
    params = init_params(model, KEY)
    base = init_params(plain, KEY)
    new = {name: part for name, part in params.items() if name not in base}
    if drawn:
        new = jax.tree.map(lambda leaf: 0.5 * jax.random.normal(KEY, leaf.shape), new)
    return model, base | new


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_changes_the_output_but_not_at_first_where_it_can(kind):
    model, params = adapted(kind, drawn=False)
    plain = hidden_states(MODEL, init_params(MODEL, KEY), TOKENS, POSITIONS)
    first = hidden_states(model, params, TOKENS, POSITIONS)
    if kind in ("lora", "bottleneck"):
        np.testing.assert_allclose(first, plain, atol=1e-6)  # another program, which may round sums otherwise
    model, params = adapted(kind)
    assert float(jnp.abs(hidden_states(model, params, TOKENS, POSITIONS) - plain).max()) > 0.05


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_in_bfloat16_are_those_of_float32(kind):
    """XLA:CPU has no program for some products in bfloat16, of what stands before the text first of all."""
    model, params = adapted(kind)

    weights_D = jax.random.normal(KEY, (MODEL.n_embd,))

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(dtype, params):
        def objective(params):
            x_BTD = gpt.hidden_states(model, params, TOKENS, POSITIONS, compute=Compute(dtype=dtype, unroll=1))
            return jnp.mean(x_BTD.astype(jnp.float32) @ weights_D)

        return jax.grad(objective)(params)

    expected, actual = (jax.flatten_util.ravel_pytree(gradient(dtype, params))[0] for dtype in ("float32", "bfloat16"))
    # activations have 8 bits of mantissa; the error of a direction of many parameters is a fraction of that
    assert float(jnp.vdot(expected, actual) / (jnp.linalg.norm(expected) * jnp.linalg.norm(actual))) > 0.99


def test_a_prefix_is_trained_on_rows_of_one_token(monkeypatch):
    """A row of one token attends to the prefix as a decoded token does to a cache, for which there is a C++ kernel."""
    change = {"n_layer": 1, "n_embd": 32}  # heads of 16 numbers, which the kernel needs
    model, params = adapted("prefix", change=change)
    tokens_B1 = jnp.asarray([[3], [5]])

    def gradient():
        def objective(adapters):
            states = gpt.hidden_states(model, params | {"adapters": adapters}, tokens_B1, jnp.zeros_like(tokens_B1))
            return jnp.sum(jnp.sin(states))

        return jax.jit(jax.grad(objective))(params["adapters"])

    found = gradient()  # by the kernel, where the machine has it
    monkeypatch.setattr(build, "ready", lambda: False)
    expected = gradient()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("change", [{"rank": 2}, {"alpha": 1.0}, {"targets": ("mlp/w_in",)}, {"dropout": 0.5}])
def test_every_option_of_lora_changes_something(change):
    model, params = adapted("lora")
    other = dataclasses.replace(model, adapter=dataclasses.replace(model.adapter, **change))
    if change.keys() & {"rank", "targets"}:
        fresh = init_params(other, KEY)["adapters"]
        assert jax.tree.map(jnp.shape, fresh) != jax.tree.map(jnp.shape, params["adapters"])
        return
    before, after = (hidden_states(m, params, TOKENS, POSITIONS, key=KEY) for m in (model, other))
    assert float(jnp.abs(before - after).max()) > 0.01


def test_lora_adds_its_product_times_alpha_by_rank():
    model, params = adapted("lora")
    only = {name: jax.tree.map(lambda x, name=name: x * (name == "mlp_w_in"), part) for name, part in
            params["adapters"].items()}  # fmt: skip
    a_LDR, b_LRF = (np.asarray(only["mlp_w_in"][name], np.float64) for name in "ab")
    base = init_params(MODEL, KEY)
    mlp = base["blocks"]["mlp"] | {"w_in": base["blocks"]["mlp"]["w_in"] + (6.0 / 4) * (a_LDR @ b_LRF)}
    expected = hidden_states(MODEL, base | {"blocks": base["blocks"] | {"mlp": mlp}}, TOKENS, POSITIONS)
    found = hidden_states(model, params | {"adapters": only}, TOKENS, POSITIONS)
    np.testing.assert_allclose(found, expected, atol=2e-5)  # float32 sums of about 64 terms, in another order
    assert float(jnp.abs(found - hidden_states(MODEL, base, TOKENS, POSITIONS)).max()) > 0.05


@pytest.mark.parametrize("targets", [LORA_TARGETS[:1], LORA_TARGETS])
def test_merged_and_unmerged_agree(targets):
    model, params = adapted("lora")
    model = dataclasses.replace(model, adapter=dataclasses.replace(model.adapter, targets=targets))
    names = {target.replace("/", "_") for target in targets}
    params["adapters"] = {name: part for name, part in params["adapters"].items() if name in names}
    merged_model, merged = merge_lora(model, params)
    assert merged_model == MODEL and merged.keys() == init_params(MODEL, KEY).keys()
    before = hidden_states(model, params, TOKENS, POSITIONS)
    after = hidden_states(merged_model, merged, TOKENS, POSITIONS)
    np.testing.assert_allclose(before, after, atol=2e-5)  # float32 sums of about 64 terms, in another order
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(before, hidden_states(MODEL, init_params(MODEL, KEY), TOKENS, POSITIONS), atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((kind, {}) for kind in ADAPTERS),
        ("lora", ACROSS_LAYERS),
        pytest.param("prefix", ACROSS_LAYERS, marks=pytest.mark.slow),
        pytest.param("bottleneck", ACROSS_LAYERS, marks=pytest.mark.slow),
    ],
)
def test_decoding_with_a_cache_is_the_full_forward_pass(kind, change):
    model, params = adapted(kind, change=change)
    full = hidden_states(model, params, TOKENS, POSITIONS)
    model, params = gpt.for_decoding(model, params)
    params = decoding_weights(model, params, "float32", one_row=False).params
    cache = init_cache(model, jnp.zeros(3, jnp.int32), 16, jnp.float32)
    first, cache = extend(model, params, TOKENS[:, :5], cache, "float32")
    rest, _ = extend(model, params, TOKENS[:, 5:], cache, "float32")
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), full, atol=3e-5)  # lora is merged: see above


@pytest.mark.parametrize("kind", ADAPTERS)
def test_sampling_uses_the_adapter(kind):
    model, params = adapted(kind)
    options = SampleConfig(max_new_tokens=4, temperature=0.0)
    prompt = np.asarray(TOKENS[0])
    new = np.concatenate([piece.tokens_N for [piece] in stream(model, params, Request([prompt], options))])
    ids_BT = jnp.concatenate([prompt, new])[None]
    x_BTD = hidden_states(model, params, ids_BT, jnp.arange(ids_BT.shape[1])[None])
    likeliest = jnp.argmax(logits(model, params, x_BTD)[0], axis=-1)
    assert new.tolist() == likeliest[9:13].tolist()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_documents_in_a_window_do_not_see_each_other(kind):
    model, params = adapted(kind)
    segments = jnp.broadcast_to((jnp.arange(10) >= 4).astype(jnp.int32), TOKENS.shape)
    positions = jnp.where(segments == 1, POSITIONS - 4, POSITIONS)
    packed = hidden_states(model, params, TOKENS, positions, segments)
    alone = hidden_states(model, params, TOKENS[:, 4:], POSITIONS[:, :6])
    np.testing.assert_allclose(packed[:, 4:], alone, atol=1e-5)


def test_blocks_in_two_stacks_are_the_same_model():
    params = init_params(MODEL, KEY)
    stacks = tuple(
        jax.tree.map(lambda leaf, part=part: leaf[part], params["blocks"]) for part in (slice(1), slice(1, 2))
    )
    model = dataclasses.replace(MODEL, dropout=0.3)
    whole = hidden_states(model, params, TOKENS, POSITIONS, key=KEY)
    cut = hidden_states(model, params | {"blocks": stacks}, TOKENS, POSITIONS, key=KEY)
    np.testing.assert_allclose(whole, cut, atol=1e-6)


def with_head(kind: str | None, labels: int = 3):
    model, params = adapted(kind) if kind else (MODEL, init_params(MODEL, KEY))
    return model, params | {"heads": {"classify": init_head(MODEL.n_embd, labels, KEY)}}


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [(None, "last"), (None, "mean"), ("lora", "last"), ("bottleneck", "mean"), ("prompt", "mean"), ("prefix", "last")],
)
def test_padding_never_leaks(kind, pooling):
    model, params = with_head(kind)
    task = TaskConfig(kind="classify", pooling=pooling)
    lengths = np.array([4, 10, 4], np.int32)
    rows = np.asarray(TOKENS)

    def batch(inputs, lengths):
        return TextBatch(inputs, lengths, np.zeros(len(inputs), np.int32), np.ones(len(inputs), np.float32))

    def run(inputs, lengths):
        return label_logits(model, task, Compute(unroll=1), params, "classify", batch(inputs, lengths))

    together = run(rows, lengths)
    garbage = np.where(np.arange(10)[None] < lengths[:, None], rows, 63)
    np.testing.assert_array_equal(run(garbage, lengths), together)
    short = lengths == 4
    alone = run(rows[short, :4], lengths[short])
    np.testing.assert_allclose(alone, together[short], atol=1e-6)  # other shapes sum in another order


def test_pooling_reads_real_tokens_only():
    x_BTD = jnp.arange(24.0).reshape(2, 4, 3)
    lengths = jnp.array([3, 1])
    np.testing.assert_allclose(pool(x_BTD, lengths, "mean"), [x_BTD[0, :3].mean(0), x_BTD[1, 0]])
    np.testing.assert_allclose(pool(x_BTD, lengths, "last"), [x_BTD[0, 2], x_BTD[1, 0]])
    assert np.isfinite(pool(x_BTD, jnp.array([0, 0]), "mean")).all()


def test_label_losses_are_those_of_the_books():
    logits_BN = jax.random.normal(KEY, (4, 3))
    targets, weights = jnp.array([0, 2, -1, 1]), jnp.array([1.0, 2.0, 5.0, 0.5])
    p = np.asarray(jax.nn.softmax(logits_BN))
    expected = -(np.log(p[0, 0]) + 2 * np.log(p[1, 2]) + 0.5 * np.log(p[3, 1]))
    loss = label_loss(logits_BN, targets, weights)
    np.testing.assert_allclose([loss.nll, loss.objective, loss.count], [expected, expected, 3.5], rtol=1e-6)
    smooth = label_loss(logits_BN, targets, weights, 0.3)
    even = -np.log(p).mean(-1)
    np.testing.assert_allclose(
        smooth.objective, 0.7 * expected + 0.3 * (even[0] + 2 * even[1] + 0.5 * even[3]), rtol=1e-6
    )
    several = jnp.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    s = np.asarray(jax.nn.sigmoid(logits_BN))
    yes_or_no = -np.where(several, np.log(s), np.log(1 - s)).mean(-1)
    found = multi_label_loss(logits_BN, several, weights)
    np.testing.assert_allclose(found.nll, (yes_or_no * np.asarray(weights)).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.count, 8.5)


def test_tags_read_every_position():
    model, params = with_head(None)
    params["heads"] = {"tag": params["heads"]["classify"]}
    arrays = Batch(TOKENS, TOKENS, jnp.zeros_like(TOKENS), POSITIONS)
    found = label_logits(model, TaskConfig(kind="tag"), Compute(unroll=1), params, "tag", arrays)
    x_BTD = hidden_states(model, params, TOKENS, POSITIONS)
    head = params["heads"]["tag"]
    np.testing.assert_allclose(found, x_BTD @ head["w"].T + head["bias"][None, None], atol=1e-5)
    assert_trees_equal(jnp.shape(found), (3, 10, 3))
