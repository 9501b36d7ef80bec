"""Tokenizers as SentencePiece makes them, from tokenizer.json and from GGUF, against the tokenizers library."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import tokenizers

from gptjax.checkpoints.run_dir import LoadedRun
from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.exchange.gguf_file import GgufFile
from gptjax.exchange.gguf_tokenizer import gguf_tokenizer_files
from gptjax.exchange.hf_tokenizer import export_tokenizer, import_tokenizer
from gptjax.exchange.mixed_texts import mixed_texts
from gptjax.exchange.tokenizer_files import TokenizerFiles, read_tokenizer_files
from gptjax.serving.chat_format import chat_format
from gptjax.text.chats import USER, Message
from gptjax.text.tokenizer import tokenizer_from_json
from gptjax.text.tokenizers.base import END_OF_TEXT, tokenizer_to_json
from gptjax.text.tokenizers.byte_pair import bpe_tokenizer_from_ranks
from gptjax.text.train_bpe import PATTERN, train_ranks

WORDS = "the cat sat on the mat and the dog, naïve as a log in the fog, ate the 12 oats; " * 20
SPECIAL = ("<unk>", "<s>", "</s>")
TO_PIECES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
BACK = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
KINDS = {
    "llama 2": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, TO_PIECES]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*BACK, STRIP]},
    },
    "metaspace": {
        "normalizer": None,
        "pre_tokenizer": METASPACE,
        "decoder": {"type": "Sequence", "decoders": [*BACK, STRIP]},
    },
    "gemma": {
        "normalizer": TO_PIECES,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": {"type": "Sequence", "decoders": BACK},
    },
}


@functools.cache
def trained():
    """Vocabulary and merges."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.train_from_iterator([WORDS], tokenizers.trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(library.to_str())["model"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {name: i for i, name in enumerate([*names, *pieces])}, model["merges"]


def content(kind: str) -> dict:
    vocab, merges = trained()
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab[name], "content": name, "special": True, **how} for name in SPECIAL],
        **KINDS[kind],
        "model": {
            **{"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"},
            **{"vocab": dict(vocab), "merges": merges},
        },
    }


def texts():
    """Mixed texts that neither hold a name of a special token nor U+2581, which stands for a space."""
    found = [*mixed_texts(["the cat", " oats", "12"]), WORDS, "", " ", "  two  spaces \n"]
    return [text for text in found if "▁" not in text and not any(name in text for name in SPECIAL)]


def check(tokenizer, library, puts_a_space: bool):
    for text, expected in zip(texts(), library.encode_batch(texts(), add_special_tokens=False), strict=True):
        ids = tokenizer.encode(text).tolist()
        assert ids == expected.ids, repr(text)
        decoded = b"".join(tokenizer.decode_bytes([i]) for i in ids).decode()
        assert decoded.removeprefix(" " if puts_a_space else "") in (text, text.removeprefix(" "))
        assert library.decode(ids, skip_special_tokens=False) in (decoded, decoded.removeprefix(" "))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_files_own_tokenizer(kind, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content(kind)))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    size = len(trained()[0])
    tokenizer = import_tokenizer(read_tokenizer_files(tmp_path), size, lambda message: None)
    assert tokenizer is not None and tokenizer.vocab_size == size and tokenizer.end_of_text == 2
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    check(tokenizer, library, kind != "gemma")
    assert tokenizer.decode(tokenizer.encode("</s>")).strip() == "</s>"
    assert 2 not in tokenizer.encode("</s>"), "in a text it is plain text"
    chat = "<s>the cat</s> the dog</s>"
    expected = library.encode(chat, add_special_tokens=False).ids
    assert tokenizer.encode_with_special(chat).tolist() == expected and expected.count(2) == 2
    again = tokenizer_from_json(tokenizer_to_json(tokenizer), "here")
    (tmp_path / "out").mkdir()
    export_tokenizer(again, 64, tmp_path / "out", pytest.fail)
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"] == trained()[0]


def test_without_a_token_for_each_byte_it_is_left_out():
    told, changed = [], content("gemma")
    del changed["model"]["vocab"]["<0x0A>"]
    files = TokenizerFiles("here", changed)
    assert import_tokenizer(files, 1000, told.append) is None
    assert "imported without a tokenizer: it uses byte_fallback" in told[0]


@pytest.mark.parametrize("space", [True, False])
def test_scores_of_a_gguf_file_give_the_same_merges(space):
    vocab, merges = trained()
    rank = {"".join(pair): i for i, pair in reversed(list(enumerate(merges)))}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(vocab),
        "tokenizer.ggml.scores": [-float(rank.get(name, 10**6)) for name in vocab],
        "tokenizer.ggml.token_type": [3 if name in SPECIAL else 6 if name[:3] == "<0x" else 1 for name in vocab],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": space,
    }
    files = gguf_tokenizer_files(GgufFile("here", metadata, {}, lambda name: np.zeros(0)), print)
    tokenizer = import_tokenizer(files, len(vocab), lambda message: None)
    assert tokenizer is not None and tokenizer.end_of_text == 2
    own = content("llama 2")
    if not space:
        own["normalizer"] = TO_PIECES
    check(tokenizer, tokenizers.Tokenizer.from_str(json.dumps(own)), space)


def test_special_tokens_of_a_text_are_tokens_where_asked():
    import tiktoken

    ranks = train_ranks([WORDS], 300, lambda message: None)
    special = {END_OF_TEXT: len(ranks), "<|user|>": len(ranks) + 1, "<|user|>x": len(ranks) + 2}
    tokenizer = bpe_tokenizer_from_ranks(ranks, PATTERN, special)
    theirs = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    for text in ("<|user|>the cat<|endoftext|>", "a <|user|>", "<|user|>x", "", "the cat"):
        found = dataclasses.replace(tokenizer).encode_with_special(text).tolist()
        if text != "<|user|>x":  # tiktoken does not say which of two it takes
            assert found == theirs.encode(text, allowed_special="all")
    assert tokenizer.encode_with_special("<|user|>x").tolist() == [special["<|user|>x"]]


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_chat_has_the_ids_that_transformers_gives_it(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra gptjax[parity]")
    pytest.importorskip("jinja2", reason="needs the extra gptjax[chat]")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content("metaspace")))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    files = read_tokenizer_files(tmp_path)
    tokenizer = import_tokenizer(files, len(trained()[0]), lambda message: None)
    run = LoadedRun(Config(), {}, tokenizer, 0, chat_template=files.chat_template)
    messages = [Message("system", " Be a cat. "), Message(USER, "Where did you  sit?\n")]
    format = chat_format(run)
    assert format is not None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    values = [message._asdict() for message in messages]
    expected = theirs.apply_chat_template(values, add_generation_prompt=True)["input_ids"]
    assert format.encode(messages).tolist() == expected
    assert expected[0] == 1 and expected.count(2) == 2
    with pytest.raises(UserError, match="a message contains </s>"):
        format.encode([Message(USER, "x</s>")])
    (tmp_path / "chat_template.jinja").write_text(files.chat_template)  # as an export has it
    assert read_tokenizer_files(tmp_path).chat_template == files.chat_template
