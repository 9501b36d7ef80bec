"""Every family of models against transformers: random weights, in and out."""

import functools
import json

import jax
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.exchange.families import FAMILIES
from gptjax.exchange.families.fields import NEUTRAL, Fields
from gptjax.exchange.hf_model import export_model, import_model, read_model_config
from gptjax.model.gpt import Compute, hidden_states, logits
from tests.tiny import assert_trees_equal

torch = pytest.importorskip("torch", reason="needs the extra gptjax[parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra gptjax[parity]")

SMALL = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 40, "vocab_size": 61, "max_position_embeddings": 48},
}
GPT = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 48, "vocab_size": 61}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": 16}
NEOX = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40},
    **{"vocab_size": 61, "max_position_embeddings": 48},
}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
CASES = {
    "gpt2": ("gpt2", GPT),
    "gpt2, own width, relu, not tied": (
        "gpt2",
        GPT | {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ),
    "llama": ("llama", SMALL),
    "llama, one key head, tied, wide heads": (
        "llama",
        SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 10, "rms_norm_eps": 1e-2},
    ),
    "llama 3": ("llama", SMALL | {"rope_parameters": LLAMA3, "num_hidden_layers": 3, "num_key_value_heads": 4}),
    "llama, dynamic": ("llama", SMALL | {"rope_parameters": DYNAMIC}),
    "llama, yarn": ("llama", SMALL | {"rope_parameters": YARN, "hidden_act": "gelu"}),
    "mistral, window": ("mistral", SMALL | {"sliding_window": 7}),
    "mistral, no window": ("mistral", SMALL | {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen2, windows above": (
        "qwen2",
        SMALL | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", SMALL | {"head_dim": 10}),
    "gpt": ("openai-gpt", GPT),
    "gpt, silu": ("openai-gpt", GPT | {"afn": "silu", "n_layer": 3, "layer_norm_epsilon": 1e-3}),
    "smollm3": ("smollm3", SMALL | {"num_hidden_layers": 5, "rope_parameters": LLAMA3}),
    "smollm3, windows": (
        "smollm3",
        SMALL
        | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6}
        | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ),
    "granite": (
        "granite",
        SMALL
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2}
        | {"logits_scaling": 1.5},
    ),
    "granite, multipliers of one": ("granite", SMALL | {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", SMALL),
    "olmo2, all key heads": ("olmo2", SMALL | {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "phi3": ("phi3", SMALL),
    "phi3, window, partial rope": (
        "phi3",
        SMALL | {"sliding_window": 9, "hidden_size": 32, "partial_rotary_factor": 0.75, "num_key_value_heads": 4},
    ),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, sequential": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new", "tie_word_embeddings": True},
    ),
    "gemma": ("gemma", SMALL | {"head_dim": 8}),
    "gemma, one key head": ("gemma", SMALL | {"head_dim": 10, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", SMALL | {"head_dim": 8, "sliding_window": 7, "num_hidden_layers": 3, **CAPS}),
    "gemma2, no caps, no windows": (
        "gemma2",
        SMALL
        | {"head_dim": 6, "query_pre_attn_scalar": 10, "sliding_window": 48}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", SMALL | {"head_dim": 8, "sliding_window": 7, "num_hidden_layers": 7}),
    "gemma3, scaled": (
        "gemma3_text",
        SMALL
        | {"head_dim": 8, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
        | {"rope_parameters": GEMMA3_ROPE, "query_pre_attn_scalar": 10, "final_logit_softcapping": 3.0},
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40))
every_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def their_model(name: str):
    """A model in which nothing is zero or one, and attention is far from uniform."""
    model_type, fields = CASES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **fields, bos_token_id=None, eos_token_id=None)
    config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def our_logits(config, params):
    positions_BT = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    return logits(config, params, hidden_states(config, params, TOKENS, positions_BT, compute=Compute(unroll=1)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each case is saved by transformers."""

    @functools.cache
    def folder(name: str):
        path = tmp_path_factory.mktemp("hf")
        their_model(name).save_pretrained(path)
        return path

    return folder


@every_case
def test_logits_are_those_of_transformers(name, folders):
    expected = their_logits(their_model(name))
    imported = import_model(folders(name))
    assert expected.std() > 0.3, "the test needs logits that differ"
    np.testing.assert_allclose(our_logits(imported.model, imported.params), expected, atol=1e-4)


@every_case
def test_what_is_written_is_read_by_both(name, folders, tmp_path):
    """By transformers with the same logits, here as the same parameters."""
    first, to = import_model(folders(name)), tmp_path / "out"
    export_model(first.model, first.params, None, to, family_name=CASES[name][0])
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        to, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert theirs.config.model_type == CASES[name][0]
    np.testing.assert_allclose(their_logits(theirs), their_logits(their_model(name)), atol=1e-5)
    again = import_model(to)
    assert again.model == first.model
    assert_trees_equal(again.params, first.params)


@every_case
def test_the_family_is_found_without_its_name(name, folders, tmp_path):
    imported = import_model(folders(name))
    export_model(imported.model, imported.params, None, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    np.testing.assert_allclose(their_logits(theirs), their_logits(their_model(name)), atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fields_that_are_missing_have_the_defaults_of_transformers(model_type):
    written = transformers.AutoConfig.for_model(model_type).to_dict()
    told = []
    _, explicit = read_model_config(written, "config.json", told.append)
    _, implicit = read_model_config({"model_type": model_type}, "config.json", told.append)
    assert implicit == explicit
    assert not told, "every field of transformers is read, or known to change nothing"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_field_is_only_called_neutral(model_type):
    """What `NEUTRAL` names must not be a field that the family reads."""
    fields = Fields({"model_type": model_type}, "config.json")
    FAMILIES[model_type].read(fields)
    assert not fields.seen & NEUTRAL


LLAMA_REFUSALS = [
    ({"attention_bias": True}, "attention_bias=True is not supported; must be False"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"hidden_act": "mish"}, "hidden_act='mish'"),
    ({"num_key_value_heads": 3}, "must be divisible by"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type='longrope'"),
    ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "rope_scaling.factor='2' must be a number"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "swing": 3}}, "rope_scaling.swing=3"),
    ({"rope_scaling": {"type": "linear"}}, "needs factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 8}}, "rope_scaling.beta_fast=8"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 2.0}}, "attention_factor=2.0"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 must be a whole number"),
    ({"rms_norm_eps": None}, "rms_norm_eps=None must be a number"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
]
REFUSALS = {
    "gpt2": [
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
    ],
    "llama": LLAMA_REFUSALS,
    "mistral": [({"sliding_window": -1}, "sliding_window=-1 must be a whole number")],
    "qwen2": [
        ({"layer_types": ["linear_attention"] * 32}, "layer_types='linear_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 32"),
    ],
    "qwen3": [({"attention_bias": True}, "attention_bias=True")],
    "openai-gpt": [({"afn": "gelu_new"}, "afn='gelu_new'")],
    "smollm3": [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers must be a list of 36"),
        ({"use_sliding_window": True, "sliding_window": 64}, "layer 3 has neither full attention nor rope"),
    ],
    "granite": [({"mlp_bias": True}, "mlp_bias=True"), ({"logits_scaling": "1"}, "logits_scaling='1'")],
    "olmo2": [({"attention_bias": True}, "attention_bias=True")],
    "phi3": [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling.rope_type='longrope'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling='yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling='dynamic'"),
        ({"partial_rotary_factor": 0.33}, "partial_rotary_factor=0.33"),
    ],
    "gpt_neox": [({"attention_bias": False}, "attention_bias=False"), ({"rotary_pct": 2}, "rope_fraction=2")],
    "gemma": [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"hidden_act": "silu"}, "hidden_act='silu'"),
        ({"attention_bias": True}, "attention_bias=True"),
    ],
    "gemma2": [({"use_bidirectional_attention": True}, "use_bidirectional_attention=True")],
    "gemma3_text": [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"max_position_embeddings": 4096}, "sliding_window=4096 is not supported; must be less"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention.rope_type='linear'",
        ),
    ],
}


@pytest.mark.parametrize(
    ("model_type", "change", "message"), [(name, *case) for name, cases in REFUSALS.items() for case in cases]
)
def test_a_field_that_cannot_be_expressed_is_refused_by_name(model_type, change, message):
    with pytest.raises(UserError, match=message) as error:
        read_model_config({"model_type": model_type} | change, "here/config.json", lambda _: None)
    assert str(error.value).startswith("here/config.json: ")


def test_fields_of_other_programs_are_told(tmp_path):
    told = []
    read_model_config({"model_type": "llama", "unsloth_version": "1", "torch_dtype": "float16"}, "c.json", told.append)
    assert len(told) == 1
    assert 'c.json: not fields of llama, so they change nothing in transformers either: unsloth_version="1"' in told[0]


def test_both_spellings_of_rope_are_the_same_model():
    new = {"rope_parameters": LLAMA3}
    old = {"rope_theta": 5e5, "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}}
    older = old | {"rope_scaling": {"type" if k == "rope_type" else k: v for k, v in old["rope_scaling"].items()}}
    models = [read_model_config({"model_type": "llama"} | spelling, "", print)[1] for spelling in (new, old, older)]
    assert models[0] == models[1] == models[2]
    assert models[0].rope_base == 5e5


def test_weights_are_cut_into_files_of_a_given_size(folders, tmp_path):
    imported = import_model(folders("llama"))
    export_model(imported.model, imported.params, None, tmp_path / "out", shard_bytes=8_000)
    files = sorted(path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors")
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size < 8_000 + 2_000 for path in files), "but for the header"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(imported.params))
    assert_trees_equal(import_model(tmp_path / "out").params, imported.params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    np.testing.assert_allclose(their_logits(theirs), their_logits(their_model("llama")), atol=1e-5)
