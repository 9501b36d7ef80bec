import functools
import os
import random
from pathlib import Path

import numpy as np
import pytest

from gptjax.config.tokenizer import TIKTOKEN_NAMES, TokenizerConfig
from gptjax.errors import UserError
from gptjax.text.pieces import split_text
from gptjax.text.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer, tokenizer_from_json
from gptjax.text.tokenizers.base import tokenizer_to_json
from gptjax.text.tokenizers.byte_pair import bpe_tokenizer_from_ranks
from gptjax.text.train_bpe import PATTERN, byte_of_character, make_byte_level
from gptjax.text.train_wordpiece import CONTINUES

DATA = Path(__file__).parents[2] / "shared" / "data"
NASTY = (
    "Hello, world! it's 12345\r\n\r\n\ttabs and   spaces    \n \n  \n"
    "日本語。中文\nРусский עברית e\u0301\u0327 🙂👩‍👩‍👧 \0 \ufeff \u2028 \x1c <|endoftext|> <|fim_prefix|> //\n/x\n"  # noqa: RUF001
) + " " * 300
PUBLISHED = [f"tiktoken {name}" for name in TIKTOKEN_NAMES]


@functools.cache
def make(kind: str):
    if kind.startswith("tiktoken"):
        try:
            return make_tokenizer(TokenizerConfig(kind="tiktoken", name=kind.split()[1]), lambda: [])
        except UserError as error:
            where = os.environ.get("TIKTOKEN_CACHE_DIR", "not set")
            pytest.skip(f"needs the vocabulary {kind} (TIKTOKEN_CACHE_DIR is {where}): {error}")
    config = TokenizerConfig(kind=kind, **({"vocab_size": 700} if kind in ("bpe", "wordpiece") else {}))
    corpus = [NASTY, Path(__file__).read_text(), "ab" * 50]
    return make_tokenizer(config, lambda: corpus, report=lambda _: None)


KINDS = pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "wordpiece", *PUBLISHED])


@KINDS
def test_any_text_comes_back_byte_for_byte(kind):
    tokenizer = make(kind)
    for text in (NASTY, "", "a", NASTY * 40):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text


@KINDS
def test_end_of_text_is_an_id_that_no_text_encodes_to(kind):
    tokenizer = make(kind)
    assert tokenizer.end_of_text is not None
    assert tokenizer.end_of_text not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


@KINDS
def test_a_batch_encodes_as_its_texts_do(kind):
    tokenizer = make(kind)
    texts = [NASTY, "", "x", NASTY * 600]
    batch = tokenizer.encode_batch(texts)
    assert all(np.array_equal(ids, tokenizer.encode(text)) for ids, text in zip(batch, texts, strict=True))


@KINDS
def test_saved_file_gives_back_the_same_tokenizer_from_nothing_else(kind, tmp_path, monkeypatch):
    tokenizer = make(kind)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nothing"))
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.kind, loaded.vocab_size, loaded.end_of_text) == (
        tokenizer.kind,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert loaded.fingerprint == tokenizer.fingerprint
    assert np.array_equal(loaded.encode(NASTY), tokenizer.encode(NASTY))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@KINDS
def test_every_id_decodes_and_none_beyond(kind):
    tokenizer = make(kind)
    assert all(tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size))
    for wrong in (tokenizer.vocab_size, -1):
        with pytest.raises(UserError, match=rf"token id {wrong} .*\[0, {tokenizer.vocab_size}\)"):
            tokenizer.decode([0, wrong])


@KINDS
def test_half_a_surrogate_pair_is_refused(kind):
    for call in (lambda t: t.encode("ab\ud800c"), lambda t: t.encode_batch(["ab\ud800c"])):
        with pytest.raises(UserError, match=r"U\+D800 at character 2"):
            call(make(kind))


@pytest.mark.parametrize("kind", ["bpe", "tiktoken gpt2", "tiktoken cl100k_base", "tiktoken o200k_base"])
@pytest.mark.parametrize("text", [" " * 1_000_000, "a" * 1_000_000, "\n" * 1_000_000, "中" * 300_000])
def test_a_million_equal_characters_come_back(kind, text):
    tokenizer = make(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["bpe", *PUBLISHED])
@pytest.mark.parametrize(
    ("words", "glue"),
    [
        ([*NASTY.split(), "  ", "\n", "\n\n", "\r\n", "it's", "don't", "a/b", ".\n", " \n", "e\u0301"], " "),
        (["中文", "1", "\n", "\n\n", "\r\n", "/", ".\n", " \n", "//\n", "🙂", "ß", "'s", " "], ""),
    ],
)
def test_cutting_a_long_text_does_not_change_its_ids(kind, words, glue, monkeypatch):
    tokenizer = make(kind)
    monkeypatch.setattr("gptjax.text.pieces._PIECE_CHARACTERS", 2**10)
    text = glue.join(random.Random(0).choices(words, k=30_000))
    assert len(list(split_text(text))) > 30
    assert tokenizer.encode(text).tolist() == tokenizer._encoding.encode_ordinary(text)


def test_published_encodings_have_their_sizes():
    sizes = [make(kind).vocab_size for kind in PUBLISHED]
    assert sizes == [50257, 50257, 50281, 100277, 200019]


def test_trained_merges_encode_as_the_library_that_learned_them():
    from tokenizers import models

    tokenizer = make("bpe")
    assert tokenizer.vocab_size == 700
    corpus = [NASTY, Path(__file__).read_text(), "ab" * 50]
    library = make_byte_level()
    from tokenizers.trainers import BpeTrainer

    trainer = BpeTrainer(
        vocab_size=699, min_frequency=2, show_progress=False, initial_alphabet=sorted(byte_of_character())
    )
    library.train_from_iterator(corpus, trainer)
    assert isinstance(library.model, models.BPE)
    for text in (*corpus, "unseen wörds 日本 🙃 123456"):
        assert tokenizer.encode(text).tolist() == library.encode(text).ids


def test_word_pieces_are_the_longest_that_match():
    tokenizer = make("wordpiece")
    names = {tokenizer._library.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    for text in (NASTY, "the tokenizer's tokens, unseen w\u00f6rds \u2581 <|endoftext|> 123456"):
        expected = []
        for word, _ in tokenizer._library.pre_tokenizer.pre_tokenize_str(text):
            start = 0
            while start < len(word):
                lead = CONTINUES if start else ""
                stop = next(stop for stop in range(len(word), start, -1) if lead + word[start:stop] in names)
                expected.append(names[lead + word[start:stop]])
                start = stop
        assert tokenizer.encode(text).tolist() == expected
        assert tokenizer.decode(expected) == text and tokenizer.end_of_text not in expected
    assert all(name in names and CONTINUES + name in names for name in byte_of_character())
    again = tokenizer_from_json(tokenizer_to_json(tokenizer), "x")
    assert again.encode(NASTY).tolist() == tokenizer.encode(NASTY).tolist()
    with pytest.raises(UserError, match=r"vocab_size=512 must be above 512 for tokenizer.kind=wordpiece"):
        make_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=512), lambda: [NASTY])


def test_training_twice_learns_the_same():
    corpus = [Path(__file__).read_text()]
    config = TokenizerConfig(kind="bpe", vocab_size=1000)
    first, second = (make_tokenizer(config, lambda: corpus) for _ in range(2))
    assert tokenizer_to_json(first) == tokenizer_to_json(second)


def test_corpus_too_small_for_the_vocabulary_is_told():
    told = []
    tokenizer = make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=5000), lambda: ["abab abab"], told.append)
    assert 257 < tokenizer.vocab_size < 300
    assert f"only {tokenizer.vocab_size} tokens" in told[0]


def test_bytes_alone_are_a_vocabulary_of_257():
    tokenizer = make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=257), lambda: ["abab"])
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("abab")) == 4


def test_characters_of_one_document_have_no_end_of_text():
    config = TokenizerConfig(kind="chars")
    one, two = make_tokenizer(config, lambda: ["ba"]), make_tokenizer(config, lambda: ["b", "a"])
    assert (one.vocab_size, one.end_of_text) == (2, None)
    assert (two.vocab_size, two.end_of_text) == (3, 2)
    assert one.encode("ab").tolist() == [0, 1]


def test_shakespeare_has_65_characters():
    path = DATA / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    tokenizer = make_tokenizer(TokenizerConfig(kind="chars"), lambda: [path.read_text()])
    assert tokenizer.vocab_size == 65


def test_unknown_character_is_named():
    tokenizer = make_tokenizer(TokenizerConfig(kind="chars"), lambda: ["abc"])
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\) at 1"):
        tokenizer.encode("aé")


def test_ranks_of_another_program_make_a_tokenizer_with_special_tokens():
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    tokenizer = bpe_tokenizer_from_ranks(ranks, PATTERN, {"<|endoftext|>": 257, "<|pad|>": 260})
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (261, 257)
    assert tokenizer.encode("ab").tolist() == [256]
    assert tokenizer.decode([256, 260, 258]) == "ab<|pad|><|reserved_258|>"
    with pytest.raises(UserError, match="single byte 0x07"):
        bpe_tokenizer_from_ranks({k: v for k, v in ranks.items() if k != b"\x07"}, PATTERN, {})
    with pytest.raises(UserError, match="different numbers"):
        bpe_tokenizer_from_ranks(ranks, PATTERN, {"<|endoftext|>": 256})
    with pytest.raises(UserError, match="not a valid byte-pair encoding"):
        bpe_tokenizer_from_ranks(ranks, "(", {"<|endoftext|>": 257})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format":"other","version":1,"kind":"bytes"}',
        '{"format":"gptjax-tokenizer","version":99,"kind":"bytes"}',
        '{"format":"gptjax-tokenizer","version":1,"kind":"words"}',
        '{"format":"gptjax-tokenizer","version":1,"kind":"chars"}',
        '{"format":"gptjax-tokenizer","version":1,"kind":"chars","characters":"ba","end_of_text":true}',
        '{"format":"gptjax-tokenizer","version":1,"kind":"chars","characters":"\\ud800","end_of_text":true}',
        '{"format":"gptjax-tokenizer","version":1,"kind":"bpe","name":"","pattern":"","tokens":["!"],"special_tokens":{}}',
        '{"format":"gptjax-tokenizer","version":1,"kind":"bpe","name":"","pattern":"","tokens":3,"special_tokens":{}}',
        '{"format":"gptjax-tokenizer","version":1,"kind":"bpe","name":1,"pattern":2,"tokens":[],"special_tokens":[]}',
    ],
)
def test_malformed_file_is_one_line_that_names_it(text):
    with pytest.raises(UserError, match=r"^here: ") as error:
        tokenizer_from_json(text, "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "o200k_base"])
def test_vocabulary_that_cannot_be_loaded_says_how_to_provide_it(name, monkeypatch, tmp_path):
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match=rf"tokenizer\.name={name}.*no network.*TIKTOKEN_CACHE_DIR"):
        make_tokenizer(TokenizerConfig(name=name), lambda: [])
