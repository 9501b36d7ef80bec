"""The model computes what GPT-2 is: against NumPy, written from the paper's description, and against transformers.

Shape suffixes: T position, D n_embd, H heads, C head_dim, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.exchange.hf_model import export_model, import_model
from gptjax.model.gpt import hidden_states, init_params, logits

SHAPES = [
    ModelConfig(n_layer=2, n_head=3, n_embd=24, block_size=20, vocab_size=101),
    ModelConfig(n_layer=3, n_head=1, n_embd=8, block_size=33, vocab_size=17),
    ModelConfig(n_layer=1, n_head=8, n_embd=64, block_size=16, vocab_size=1031),
    ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=50, vocab_multiple=64),
]
NAMES = [
    f"{m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, {m.vocab_size} of {m.padded_vocab_size}" for m in SHAPES
]


@functools.cache
def make_params(model: ModelConfig, seed: int = 0) -> dict:
    """Parameters in which nothing is zero or one, and attention is far from uniform."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(seed)))
    noise = jax.tree.map(lambda leaf: 0.17 * rng.normal(size=leaf.shape), shapes)
    for norm in (noise["norm_f"], noise["blocks"]["norm_1"], noise["blocks"]["norm_2"]):
        norm["scale"] += 1
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), noise)


@functools.partial(jax.jit, static_argnums=0)
def our_logits(model: ModelConfig, params: dict, tokens_BT: np.ndarray) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    return logits(model, params, hidden_states(model, params, tokens_BT, positions_BT))


def gpt2_in_numpy(tensors: dict, n_head: int, tokens_T: np.ndarray) -> np.ndarray:
    """Logits `[T, V]` of GPT-2, from the tensors of a model file, in float64 and one position at a time."""
    w = {name.removeprefix("transformer."): value.astype(np.float64) for name, value in tensors.items()}
    n_layer = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("h."))

    def norm(x_D, name):
        normed = (x_D - x_D.mean()) / np.sqrt(x_D.var() + 1e-5)
        return normed * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    memory: list = [([], []) for _ in range(n_layer)]
    rows = []
    for position, token in enumerate(tokens_T):
        x_D = w["wte.weight"][token] + w["wpe.weight"][position]
        for layer, (keys, values) in enumerate(memory):
            q_D, k_D, v_D = np.split(linear(norm(x_D, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn"), 3)
            keys.append(k_D.reshape(n_head, -1))
            values.append(v_D.reshape(n_head, -1))
            heads = []
            for head, q_C in enumerate(q_D.reshape(n_head, -1)):
                weights = np.exp([q_C @ k_HC[head] / np.sqrt(len(q_C)) for k_HC in keys])
                heads.append(sum(p * v_HC[head] for p, v_HC in zip(weights / weights.sum(), values, strict=True)))
            x_D = x_D + linear(np.concatenate(heads), f"h.{layer}.attn.c_proj")
            x_D = x_D + linear(
                gelu(linear(norm(x_D, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")), f"h.{layer}.mlp.c_proj"
            )
        rows.append(w["wte.weight"] @ norm(x_D, "ln_f"))
    return np.stack(rows)


@pytest.mark.parametrize("model", SHAPES, ids=NAMES)
def test_logits_equal_a_gpt2_written_in_numpy(model, tmp_path):
    from safetensors.numpy import load_file

    params = make_params(model)
    export_model(model, params, None, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tokens_BT = np.random.default_rng(2).integers(0, model.vocab_size, (2, model.block_size))
    expected = np.stack([gpt2_in_numpy(tensors, model.n_head, tokens_T) for tokens_T in tokens_BT])
    assert np.std(expected) > 0.1, "the test needs logits that differ"
    np.testing.assert_allclose(our_logits(model, params, tokens_BT), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 24, 101, 20), (3, 1, 8, 17, 33), (1, 8, 64, 1031, 16), (4, 5, 35, 50, 11)])
def test_logits_equal_those_of_transformers(shape, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra gptjax[parity]")
    transformers = pytest.importorskip("transformers", reason="needs the extra gptjax[parity]")
    n_layer, n_head, n_embd, vocab_size, n_positions = shape
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            vocab_size=vocab_size,
            n_positions=n_positions,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    with torch.no_grad():  # new biases are zero and new norms one, which would hide a mix-up
        for tensor in hf.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
    hf.save_pretrained(tmp_path / "hf")
    imported = import_model(tmp_path / "hf")
    tokens_BT = np.random.default_rng(1).integers(0, vocab_size, (3, n_positions))
    with torch.no_grad():
        expected = hf(torch.from_numpy(tokens_BT)).logits.numpy()
    assert np.std(expected) > 0.1, "the test needs logits that differ"
    np.testing.assert_allclose(our_logits(imported.model, imported.params, tokens_BT), expected, atol=1e-4)
