"""Hugging Face GPT-2 in and out."""

import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax.checkpoints.run_dir import load_run, write_run
from gptjax.config.model import ModelConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.exchange import ExportConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.exchange.families import FAMILIES
from gptjax.exchange.families.fields import Fields
from gptjax.exchange.hf_model import export_model, import_model, read_model_config
from gptjax.exchange.mixed_texts import mixed_texts
from gptjax.exchange.runs import export_run, import_run
from gptjax.generation.decode import generate
from gptjax.text.tokenizer import make_tokenizer, tokenizer_from_json
from gptjax.text.tokenizers.base import END_OF_TEXT, tokenizer_to_json
from gptjax.text.tokenizers.byte_pair import bpe_tokenizer_from_ranks
from gptjax.text.tokenizers.plain import ByteTokenizer, CharTokenizer
from gptjax.text.train_bpe import PATTERN, train_ranks
from tests.test_model_parity import make_params, our_logits
from tests.tiny import assert_trees_equal

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=45)
WORDS = "the cat sat on the mat and the dog sat on the log; " * 20
TEXTS = [
    "the cat sat on the mat",
    "  two  spaces\n\n\tand\r\nlines ",
    "It's 12345 o'clock, THE CAT'S LL'LL",
    "naïve café Ünïcödé 日本語 😀👩‍👩‍👧 \x00\x7f",
    "",
    " ",
    "a" * 50 + " " * 50 + "\n" * 9,
]


def make_bpe(pattern=PATTERN):
    ranks = train_ranks([WORDS], 300, lambda message: None)
    return bpe_tokenizer_from_ranks(ranks, pattern, {END_OF_TEXT: len(ranks)})


def export(tmp_path, model=MODEL, tokenizer=None):
    export_model(model, make_params(model), tokenizer, tmp_path / "hf")
    return tmp_path / "hf"


def change_config(hf_dir, **fields):
    path = hf_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(hf_dir, change):
    path = hf_dir / "model.safetensors"
    save_file(change(load_file(path)), path)


# --- tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_import_undoes_export_bit_for_bit(tied, tmp_path):
    model = dataclasses.replace(MODEL, tied_embeddings=tied, dropout=0.25)
    imported = import_model(export(tmp_path, model))
    assert imported.model == model
    assert imported.tokenizer is None
    assert_trees_equal(imported.params, make_params(model))


def test_export_undoes_import_bit_for_bit(tmp_path):
    first = export(tmp_path)
    imported = import_model(first)
    export_model(imported.model, imported.params, None, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_rows_that_pad_the_vocabulary_are_cut_off(tmp_path):
    padded = dataclasses.replace(MODEL, vocab_multiple=64)
    hf_dir = export(tmp_path, padded)
    assert load_file(hf_dir / "model.safetensors")["transformer.wte.weight"].shape == (45, 16)
    imported = import_model(hf_dir)
    tokens_BT = np.arange(12)[None]
    ours = our_logits(padded, make_params(padded), tokens_BT)
    np.testing.assert_allclose(our_logits(imported.model, imported.params, tokens_BT), ours, atol=1e-6)


def test_a_file_without_prefix_in_parts_with_buffers_and_a_tied_head_is_the_same_model(tmp_path):
    hf_dir = export(tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(hf_dir / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["wte.weight"]
    tensors["h.1.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), np.float32))
    tensors["h.1.attn.masked_bias"] = np.full((), -1e4, np.float32)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, hf_dir / file)
    (hf_dir / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_trees_equal(import_model(hf_dir).params, make_params(MODEL))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read_as_float32(dtype, tmp_path):
    hf_dir = export(tmp_path)
    change_tensors(hf_dir, lambda tensors: {name: t.astype(dtype) for name, t in tensors.items()})
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), make_params(MODEL))
    assert_trees_equal(import_model(hf_dir).params, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type='gpt_neo' is not supported; supported: gpt2,"),
        ({"activation_function": "mish"}, "activation_function='mish' is not supported; must be 'gelu' or"),
        ({"n_inner": 32}, r"mlp.c_fc.weight has shape \[16, 64\], its config says \[16, 32\]"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon='small' must be a number"),
        ({"n_layer": "two"}, "n_layer='two' must be a whole number"),
        ({"n_head": 3}, "must be divisible by"),
        ({"n_layer": 3}, r"tensor h.2.ln_1.weight \[16\] is missing"),
        ({"n_layer": 1}, "tensor transformer.h.1.attn.c_attn.bias is not part of a gpt2 with 1 layers"),
        ({"vocab_size": 44}, r"tensor wte.weight has shape \[45, 16\], its config says \[44, 16\]"),
        ({"tie_word_embeddings": False}, r"tensor lm_head.weight \[45, 16\] is missing"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(fields, message, tmp_path):
    hf_dir = export(tmp_path)
    change_config(hf_dir, **fields)
    with pytest.raises(UserError, match=message) as error:
        import_model(hf_dir)
    assert "\n" not in str(error.value)


SHAPE = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 40, "vocab_size": 61, "max_position_embeddings": 48, "rope_theta": 1e4},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
}
ODD = (
    *([], {}, [[]], [{}], "x", "", -1, 0, 10**30, 10**400, float("nan"), True),
    *({"rope_type": []}, {"rope_type": "yarn", "factor": "x"}, {"rope_type": "yarn", "factor": 2, "beta_fast": "x"}),
    {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": "x"},
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_of_a_wrong_kind_in_any_field_is_one_clear_line(family):
    raw, refused = SHAPE | {"model_type": family}, 0
    fields = Fields(raw, "config.json")
    FAMILIES[family].read(fields)
    for name in ("model_type", *fields.seen):
        for value in ODD:
            try:
                read_model_config(raw | {name: value}, "config.json", str)
            except UserError as error:
                assert str(error).startswith("config.json: ") and "\n" not in str(error)
                refused += 1
    assert refused > 5 * len(fields.seen)


def test_a_readout_that_is_only_said_to_be_tied_is_refused(tmp_path):
    hf_dir = export(tmp_path)
    change_tensors(hf_dir, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    with pytest.raises(UserError, match=r"differs from transformer\.wte\.weight"):
        import_model(hf_dir)


def test_damaged_and_missing_files_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        import_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"it has no config.json"):
        import_model(tmp_path)
    hf_dir = export(tmp_path)
    weights = (hf_dir / "model.safetensors").read_bytes()
    for damaged in (b"", b"123456789", weights[:100], weights[:-10]):
        (hf_dir / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"model.safetensors: cannot be read"):
            import_model(hf_dir)
    (hf_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has neither"):
        import_model(hf_dir)
    (hf_dir / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        import_model(hf_dir)
    (hf_dir / "config.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        import_model(hf_dir)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dataclasses.replace(MODEL, n_kv_head=1), "model.n_kv_head=1"),
        (dataclasses.replace(MODEL, bias=False), "model.bias=False"),
        (dataclasses.replace(MODEL, attention_window=4), "model.attention_window=4"),
    ],
)
def test_what_gpt2_cannot_be_is_not_exported(model, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(tmp_path, model)
    assert not (tmp_path / "hf").exists()


def test_a_folder_with_files_is_not_written_to(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"it holds mine.txt"):
        export(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make this folder"):
        export_model(MODEL, make_params(MODEL), None, tmp_path / "file")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine.txt"]


# --- tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_a_bpe_tokenizer_comes_back_the_same(form, tmp_path):
    from gptjax.exchange.byte_pairs import GPT2_PATTERN

    tokenizer = make_bpe(GPT2_PATTERN if form == "vocab.json" else PATTERN)
    hf_dir = export(tmp_path, dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size), tokenizer)
    if form == "vocab.json":
        (hf_dir / "tokenizer.json").unlink()
    imported = import_model(hf_dir, pytest.fail).tokenizer
    assert imported.fingerprint == tokenizer.fingerprint


def test_the_tokenizers_library_gives_the_same_ids(tmp_path):
    from tokenizers import Tokenizer

    for number, tokenizer in enumerate((make_bpe(), ByteTokenizer())):
        model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
        export_model(model, make_params(model), tokenizer, tmp_path / str(number))
        theirs = Tokenizer.from_file(str(tmp_path / str(number) / "tokenizer.json"))
        for text in [*TEXTS, WORDS]:
            assert theirs.encode(text).ids == tokenizer.encode(text).tolist()
            assert theirs.decode(tokenizer.encode(text).tolist()) == text


def test_ids_that_only_the_model_has_become_reserved_tokens(tmp_path):
    tokenizer = make_bpe()
    size = tokenizer.vocab_size
    imported = import_model(export(tmp_path, dataclasses.replace(MODEL, vocab_size=size + 3), tokenizer)).tokenizer
    assert imported.vocab_size == size + 3
    assert imported.decode([size + 2]) == f"<|reserved_{size + 2}|>"


def break_order(content):
    content["model"]["merges"].reverse()


def break_normalizer(content):
    content["normalizer"] = {"type": "NFC"}


def break_model(content):
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


def break_prefix(content):
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (break_model, "WordLevel, not byte-level BPE"),
        (break_prefix, "add_prefix_space"),
    ],
)
def test_a_tokenizer_without_an_exact_form_is_left_out_and_named(change, reason, tmp_path):
    tokenizer = make_bpe()
    hf_dir = export(tmp_path, dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size), tokenizer)
    content = json.loads((hf_dir / "tokenizer.json").read_text())
    change(content)
    (hf_dir / "tokenizer.json").write_text(json.dumps(content))
    told = []
    assert import_model(hf_dir, told.append).tokenizer is None
    assert len(told) == 1
    assert "imported without a tokenizer" in told[0]
    assert reason in told[0]


def cut_digits(content):
    steps = content["pre_tokenizer"]["pretokenizers"]
    content["pre_tokenizer"]["pretokenizers"] = [{"type": "Digits", "individual_digits": True}, *steps]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (break_order, "does not follow the order of merges"),
        (break_normalizer, "normalizer"),
        (cut_digits, "several steps"),
    ],
)
def test_bytes_that_tiktoken_cannot_merge_so_are_merged_by_the_library(change, reason, tmp_path):
    from tokenizers import Tokenizer as Library

    hf_dir = export(tmp_path, dataclasses.replace(MODEL, vocab_size=make_bpe().vocab_size + 2), make_bpe())
    content = json.loads((hf_dir / "tokenizer.json").read_text())
    change(content)
    (hf_dir / "tokenizer.json").write_text(json.dumps(content))
    told = []
    tokenizer = import_model(hf_dir, told.append).tokenizer
    assert tokenizer is not None
    assert reason in told[0]
    assert tokenizer.vocab_size == make_bpe().vocab_size + 2
    assert tokenizer.end_of_text == make_bpe().end_of_text
    again = tokenizer_from_json(tokenizer_to_json(tokenizer), "here")
    assert again.fingerprint == tokenizer.fingerprint
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    export_model(model, make_params(model), again, tmp_path / "again", pytest.fail)
    library = Library.from_file(str(tmp_path / "again" / "tokenizer.json"))
    for text in [*TEXTS, WORDS]:
        ids = tokenizer.encode(text).tolist()
        assert ids == again.encode(text).tolist() == library.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode(), "in pieces too"
    assert tokenizer.decode(tokenizer.encode(END_OF_TEXT)) == END_OF_TEXT
    assert len(tokenizer.encode(END_OF_TEXT)) > 1, "in a text it is plain text"


def test_a_tokenizer_larger_than_the_model_is_left_out(tmp_path):
    told = []
    assert import_model(export(tmp_path, MODEL, make_bpe()), told.append).tokenizer is None
    assert "the model 45" in told[0]


def test_a_damaged_tokenizer_file_is_one_clear_line(tmp_path):
    hf_dir = export(tmp_path)
    for damaged in ("{", "{}", '{"model": {"type": "BPE"}}'):
        (hf_dir / "tokenizer.json").write_text(damaged)
        with pytest.raises(UserError, match=r"tokenizer.json: no valid"):
            import_model(hf_dir)


def test_a_tokenizer_of_characters_is_left_out_of_an_export(tmp_path):
    told = []
    export_model(MODEL, make_params(MODEL), CharTokenizer("abc", True), tmp_path / "hf", told.append)
    assert "kind chars" in told[0]
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def gpt2_tokenizer():
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs the GPT-2 vocabulary: set TIKTOKEN_CACHE_DIR")
    return make_tokenizer(TokenizerConfig(kind="tiktoken", name="gpt2"), lambda: [])


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_gpt2s_own_tokenizer_comes_back_as_the_published_one(form, tmp_path):
    tokenizer = gpt2_tokenizer()
    hf_dir = export(tmp_path, dataclasses.replace(MODEL, vocab_size=50257), tokenizer)
    if form == "vocab.json":
        (hf_dir / "tokenizer.json").unlink()
    imported = import_model(hf_dir, pytest.fail).tokenizer
    assert imported.kind == "tiktoken"
    assert imported.fingerprint == tokenizer.fingerprint


# As tiktoken writes it for cl100k_base: "{1,3}+" is possessive there, and another pattern in the tokenizers library.
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)


def test_an_exported_tokenizer_cuts_digits_as_tiktoken_does(tmp_path):
    from tokenizers import Tokenizer

    ranks = train_ranks([WORDS + "1 12 123 1234 12345 123456 " * 20], 330, lambda message: None)
    tokenizer = bpe_tokenizer_from_ranks(ranks, CL100K_PATTERN, {END_OF_TEXT: len(ranks)})
    hf_dir = export(tmp_path, dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size), tokenizer)
    theirs = Tokenizer.from_file(str(hf_dir / "tokenizer.json"))
    for text in [*TEXTS, "1234567 12 x12345y", "1234 " * 9, *mixed_texts([])]:
        assert theirs.encode(text).ids == tokenizer.encode(text).tolist(), text
    assert len(tokenizer.encode("123123")) == 2 == len(theirs.encode("123123").ids)
    imported = import_model(hf_dir, pytest.fail).tokenizer
    assert imported is not None and imported.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(r"\p{N}{1,3}+|x", r"(?>\p{N}{1,3})|x"), (r"[a-z\]]{2}+", r"(?>[a-z\]]{2})"), (r"a{3,}+ \s++", r"(?>a{3,}) \s++")],
)
def test_a_counted_possessive_is_an_atomic_group_in_the_library(ours, theirs):
    from gptjax.exchange.byte_pairs import _from_library, _to_library

    assert _to_library(ours) == theirs and _from_library(theirs) == ours
    assert _from_library(ours) != ours, "in the library it is a group that repeats"


def with_end(name: str):
    ranks = train_ranks([WORDS], 300, lambda message: None)
    special = {token: len(ranks) + n for n, token in enumerate(("<s>", "<pad>", "</s>"))}
    return bpe_tokenizer_from_ranks(ranks, PATTERN, special, name)


def export_with_end(tmp_path, name="</s>"):
    tokenizer = with_end(name)
    return export(tmp_path, dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size), tokenizer), tokenizer


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_end_token_of_another_name_comes_back(tmp_path):
    hf_dir, tokenizer = export_with_end(tmp_path)
    assert json.loads((hf_dir / "config.json").read_text())["eos_token_id"] == tokenizer.end_of_text
    assert json.loads((hf_dir / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    imported = import_model(hf_dir, pytest.fail).tokenizer
    assert imported is not None and imported.end_of_text == tokenizer.end_of_text is not None
    assert imported.fingerprint == tokenizer.fingerprint
    assert tokenizer_from_json(tokenizer_to_json(imported), "again").end_of_text == tokenizer.end_of_text


@pytest.mark.parametrize(
    ("generation", "config", "settings", "end", "told"),
    [
        (None, 2, None, "</s>", ""),
        (0, 2, "</s>", "<s>", ""),
        ([2, 1], None, None, "</s>", "of its end tokens only '</s>' is kept"),
        (None, None, "</s>", "</s>", ""),
        (None, 50256, {"content": "</s>"}, "</s>", ""),
        (None, None, None, None, "has no end token"),
    ],
)
def test_the_end_token_is_that_of_the_models_own_config(tmp_path, generation, config, settings, end, told):
    hf_dir, tokenizer = export_with_end(tmp_path)
    first = tokenizer.special["<s>"]
    shifted = [[i + first for i in given] if isinstance(given, list) else given for given in (generation, config)]
    shifted = [given + first if type(given) is int and given < 10 else given for given in shifted]
    change_json(hf_dir / "generation_config.json", eos_token_id=shifted[0])
    change_json(hf_dir / "config.json", eos_token_id=shifted[1])
    change_json(hf_dir / "tokenizer_config.json", eos_token=settings, bos_token=None)
    lines = []
    imported = import_model(hf_dir, lines.append).tokenizer
    assert imported is not None
    assert imported.end_of_text == (None if end is None else tokenizer.special[end])
    assert (told in lines[0]) if told else not lines


def test_an_own_start_token_is_told(tmp_path):
    hf_dir, _ = export_with_end(tmp_path)
    change_json(hf_dir / "tokenizer_config.json", bos_token={"content": "<s>"})
    lines = []
    import_model(hf_dir, lines.append)
    assert len(lines) == 1 and "documents begin with '</s>' here, not with its start token '<s>'" in lines[0]


def test_added_tokens_beside_a_vocabulary_are_kept(tmp_path):
    from gptjax.exchange.byte_pairs import GPT2_PATTERN

    tokenizer = make_bpe(GPT2_PATTERN)
    size = tokenizer.vocab_size
    hf_dir = export(tmp_path, dataclasses.replace(MODEL, vocab_size=size + 2), tokenizer)
    (hf_dir / "tokenizer.json").unlink()
    (hf_dir / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    change_json(hf_dir / "tokenizer_config.json", added_tokens_decoder={str(size + 1): {"content": "<sep>"}})
    imported = import_model(hf_dir, pytest.fail).tokenizer
    assert imported is not None and imported.decode([size, size + 1]) == "<pad><sep>"
    assert imported.end_of_text == tokenizer.end_of_text


def test_what_is_not_kept_of_a_tokenizer_is_told(tmp_path):
    from tokenizers import AddedToken, Tokenizer, processors

    hf_dir, tokenizer = export_with_end(tmp_path)
    change_config(hf_dir, vocab_size=tokenizer.vocab_size + 1)
    change_tensors(
        hf_dir, lambda t: t | {"transformer.wte.weight": np.pad(t["transformer.wte.weight"], ((0, 1), (0, 0)))}
    )
    library = Tokenizer.from_file(str(hf_dir / "tokenizer.json"))
    library.add_tokens([AddedToken("catdog", special=False, normalized=False)])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.special["<s>"])]
    )
    library.enable_truncation(4)
    library.save(str(hf_dir / "tokenizer.json"))
    lines = []
    imported = import_model(hf_dir, lines.append).tokenizer
    assert imported is not None and imported.decode([tokenizer.vocab_size]) == "catdog"
    assert "its added tokens 'catdog' are not matched in text here" in lines[0]
    assert "its tokenizer adds ['<s>', 'a'] around the text 'a'" in lines[1] and len(lines) == 2


def test_a_tokenizer_that_the_library_reads_otherwise_is_run_by_the_library(tmp_path):
    tokenizer = make_bpe()
    hf_dir = export(tmp_path, dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size), tokenizer)
    content = json.loads((hf_dir / "tokenizer.json").read_text())
    split = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace("\\p{N}{1,3}", "\\p{N}{1,3}(?!$)")  # "$" is the end of a line there
    (hf_dir / "tokenizer.json").write_text(json.dumps(content))
    lines = []
    imported = import_model(hf_dir, lines.append).tokenizer
    assert imported is not None and imported.kind == "library"
    assert "tiktoken would encode some text to other ids, such as" in lines[0]


def test_mixed_texts_are_always_the_same_and_of_many_kinds():
    texts = mixed_texts(["ab"])
    assert texts == mixed_texts(["ab"]) and len(texts) == 3000 and len(set(texts)) > 2500
    joined = "".join(texts)
    for part in ("don't", "12345", "日本語", "🙂", "\r\n", "   ", "\0", "ab", "٣"):
        assert joined.count(part) > 20, part


# --- run directories --------------------------------------------------------------------------------------------


def test_import_to_a_run_and_export_from_it_is_the_identity(tmp_path):
    tokenizer = make_bpe()
    hf_dir = export(tmp_path, dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size), tokenizer)
    config = import_run(hf_dir, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.config == config
    assert run.step == 0
    assert run.tokenizer is not None
    assert run.tokenizer.fingerprint == tokenizer.fingerprint
    export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "again")))
    for path in hf_dir.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskConfig(), ""),
        (
            TaskConfig(objective=ObjectiveConfig(kind="prefix")),
            "read every text from left to right, but it learned to read",
        ),
        (TaskConfig(kind="instruct"), "do not know task.template="),
    ],
)
def test_what_other_programs_do_not_know_of_a_run_is_told(tmp_path, task, message):
    config = Config(model=MODEL, tokenizer=TokenizerConfig(kind="bytes"), task=task)
    write_run(tmp_path / "run", config, make_params(MODEL), None)
    lines = []
    export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "hf")), lines.append)
    assert [line for line in lines if "other programs" in line and message in line] == (lines if message else [])


def test_wrong_imports_to_a_run_are_refused(tmp_path):
    hf_dir = export(tmp_path)
    change_config(hf_dir, model_type="gptj")
    with pytest.raises(UserError, match=r"model_type='gptj' is not supported; supported: gpt2,.* Did you mean 'gpt2'"):
        import_run(hf_dir, tmp_path / "run")
    change_config(hf_dir, model_type="gpt2")
    with pytest.raises(UserError, match=r"tokenizer.name='gpt3' must be one of"):
        import_run(hf_dir, tmp_path / "run", "gpt3")
    assert not (tmp_path / "run").exists()
    import_run(hf_dir, tmp_path / "run")
    with pytest.raises(UserError, match="already contains a run"):
        import_run(hf_dir, tmp_path / "run")
    with pytest.raises(UserError, match="is the folder that is imported"):
        import_run(hf_dir, tmp_path / "run" / ".." / "hf")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "tokenizer.json").write_text("theirs")
    with pytest.raises(UserError, match=r"theirs: has a tokenizer.json of another program"):
        import_run(hf_dir, tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["tokenizer.json"]
    with pytest.raises(UserError, match=r"no run directory \(it has no config.yaml\); convert it with gptjax import"):
        load_run(hf_dir)


def test_a_published_encoding_can_be_named(tmp_path):
    tokenizer = gpt2_tokenizer()
    hf_dir = export(tmp_path, dataclasses.replace(MODEL, vocab_size=50257))
    import_run(hf_dir, tmp_path / "run", "gpt2", pytest.fail)
    run = load_run(tmp_path / "run")
    assert run.tokenizer is not None
    assert run.tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="has 50,257 tokens, the model"):
        import_run(export(tmp_path / "small"), tmp_path / "other", "gpt2")


# --- transformers -----------------------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    pytest.importorskip("torch", reason="needs the extra gptjax[parity]")
    return pytest.importorskip("transformers", reason="needs the extra gptjax[parity]")


def their_logits(hf, tokens_BT):
    import torch

    with torch.no_grad():
        return hf.eval()(torch.from_numpy(tokens_BT)).logits.numpy()


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_in_transformers_with_equal_logits(tied, tmp_path, transformers):
    model = dataclasses.replace(MODEL, tied_embeddings=tied)
    hf_dir = export(tmp_path, model)
    hf, report = transformers.GPT2LMHeadModel.from_pretrained(hf_dir, output_loading_info=True)
    assert not any(report.values()), report
    tokens_BT = np.random.default_rng(0).integers(0, 45, (3, 12))
    np.testing.assert_allclose(their_logits(hf, tokens_BT), our_logits(model, make_params(model), tokens_BT), atol=1e-4)


def test_a_model_of_transformers_generates_the_same_tokens_here_and_comes_back(tmp_path, transformers):
    import torch

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=3,
        n_embd=24,
        n_positions=64,
        vocab_size=99,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    hf = transformers.GPT2LMHeadModel(config).eval()
    hf.save_pretrained(tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    run = load_run(tmp_path / "run")
    prompt = np.random.default_rng(3).integers(0, 99, 9)
    inputs = torch.from_numpy(prompt)[None]
    theirs = hf.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=40, do_sample=False)
    options = SampleConfig(max_new_tokens=40, temperature=0)
    [[ours]] = generate(run.config.model, run.params, [prompt], options)
    assert len(set(ours.tolist())) > 5, "the test needs tokens that differ"
    assert ours.tolist() == theirs[0, 9:].tolist()
    export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "again")))
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    for name, tensor in hf.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), tensor.numpy())


def test_autotokenizer_gives_the_same_ids(tmp_path, transformers):
    from gptjax.exchange.byte_pairs import GPT2_PATTERN

    for number, tokenizer in enumerate((make_bpe(), make_bpe(GPT2_PATTERN), ByteTokenizer())):
        model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
        export_model(model, make_params(model), tokenizer, tmp_path / str(number))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert theirs.eos_token_id == tokenizer.end_of_text
        assert len(theirs) == tokenizer.vocab_size
        for text in [*TEXTS, WORDS]:
            assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
            ids = tokenizer.encode(text).tolist()
            assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
