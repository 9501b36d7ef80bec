"""Vocabularies that grow or shrink, and the report on tokenizers."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from gptjax.checkpoints.run_dir import load_run, write_run
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.exchange.vocabulary import write_with_vocabulary
from gptjax.text.prepare import prepare
from gptjax.text.tokenizer import make_tokenizer
from gptjax.text.tokenizers.byte_pair import BytePairTokenizer
from gptjax.text.vocabulary import extend, learn_tokens, prune
from tests.tiny import MODEL, hidden_states, init_params

GENERAL = ["the sea and the land and the sky are wide; they were seen then there"] * 4
SPECIAL = ["def returning(self): return self.returned\n    self.returning = selfless"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    made = make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=285), lambda: GENERAL, lambda _: None)
    assert isinstance(made, BytePairTokenizer)
    return made


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    import jax

    folder = tmp_path_factory.mktemp("vocabulary") / "run"
    model = dataclasses.replace(
        MODEL, n_layer=1, vocab_size=tokenizer.vocab_size, tied_embeddings=False, output_bias=True, vocab_multiple=64
    )
    params = jax.tree.map(np.asarray, init_params(model, jax.random.key(0)))
    params["head"]["bias"] = np.linspace(-1, 1, model.padded_vocab_size, dtype=np.float32)
    config = Config(model=model, tokenizer=TokenizerConfig(kind="bpe", vocab_size=tokenizer.vocab_size))
    write_run(folder, config, params, tokenizer)
    return folder


def logits(run_dir, text: str) -> np.ndarray:
    loaded = load_run(run_dir)
    ids = loaded.tokenizer.encode(text)[None, : MODEL.block_size]
    positions = np.arange(ids.shape[1])[None]
    x_BTD = np.asarray(hidden_states(loaded.config.model, loaded.params, ids, positions), np.float32)
    head = loaded.params["head"]
    return (x_BTD @ np.asarray(head["w"]).T + np.asarray(head["bias"]))[0, :, : loaded.config.model.vocab_size]


def test_new_tokens_are_the_most_frequent_pairs_and_old_ids_stay(tokenizer):
    tokens = learn_tokens(tokenizer, SPECIAL, 12)
    pairs = Counter()
    for text in SPECIAL:
        for word in text.replace("\n    ", " ").replace("(", " ").replace(".", " ").split():
            ids = tokenizer.encode(" " + word if word != "def" else word)
            pairs.update(zip(ids.tolist(), ids[1:].tolist(), strict=False))
    longer, pieces = extend(tokenizer, tokens)
    assert len(set(tokens)) == 12 == longer.vocab_size - tokenizer.vocab_size
    assert b"self" in tokens or b" self" in tokens
    first = tuple(pieces[0].tolist())
    assert pairs[first] >= max(pairs.values()) * 0.9
    for i, (token, old) in enumerate(zip(tokens, pieces, strict=True)):
        assert longer.decode_bytes([tokenizer.vocab_size + i]) == token == tokenizer.decode_bytes(old)
    assert all(longer.decode_bytes([i]) == tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size))
    assert longer.special_tokens == tokenizer.special_tokens
    for text in (*GENERAL, *SPECIAL):
        assert longer.decode(longer.encode(text)) == text
    assert len(longer.encode(SPECIAL[0])) < len(tokenizer.encode(SPECIAL[0]))
    assert len(learn_tokens(tokenizer, ["a"], 5)) == 0


def test_a_pruned_encoding_keeps_frequent_tokens_and_reaches_every_one(tokenizer):
    counts = np.bincount(tokenizer.encode("the sea and the sky"), minlength=tokenizer.vocab_size)
    smaller, old_ids = prune(tokenizer, counts, 275)
    assert smaller.vocab_size == 275 == len(old_ids) == len(set(old_ids.tolist()))
    for new, old in enumerate(old_ids):
        assert smaller.decode_bytes([new]) == tokenizer.decode_bytes([int(old)])
        if new != smaller.end_of_text:
            raw = smaller.decode_bytes([new])
            assert smaller._encoding._encode_single_piece(raw) == [new]
    text = "the sea and the sky"
    assert old_ids[smaller.encode(text)].tolist() == tokenizer.encode(text).tolist()
    assert smaller.decode(smaller.encode(GENERAL[0] + "é")) == GENERAL[0] + "é"


def test_a_pruned_run_has_the_same_logits_of_kept_tokens(run, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("the sea and the sky")
    flags = ["--data.path", str(tmp_path / "a.txt"), "--to", str(tmp_path / "small"), "--prune", "270"]
    assert main(["tokenizer", str(run), *flags]) == 0
    counts = np.bincount(tokenizer.encode("the sea and the sky"), minlength=tokenizer.vocab_size)
    _, old_ids = prune(tokenizer, counts, 270)
    before, after = logits(run, "the sea and"), logits(tmp_path / "small", "the sea and")
    assert after.shape == (len(before), 270)
    np.testing.assert_allclose(after, before[:, old_ids], rtol=1e-5, atol=1e-6)


def test_an_extended_run_has_means_of_pieces_as_rows(run, tokenizer, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("".join(SPECIAL))
    flags = ["--data.path", str(tmp_path / "a.txt"), "--to", str(tmp_path / "large"), "--extend", "9"]
    assert main(["tokenizer", str(run), *flags]) == 0
    old, new = load_run(run), load_run(tmp_path / "large")
    size = tokenizer.vocab_size
    assert new.config.model.vocab_size == size + 9 == new.tokenizer.vocab_size
    for table, other in (
        (old.params["embed"]["tokens"], new.params["embed"]["tokens"]),
        (old.params["head"]["w"], new.params["head"]["w"]),
        (old.params["head"]["bias"], new.params["head"]["bias"]),
    ):
        table, other = np.asarray(table), np.asarray(other)
        assert np.array_equal(other[:size], table[:size])
        for i in range(size, size + 9):
            ids = tokenizer._encoding._encode_single_piece(new.tokenizer.decode_bytes([i]))
            np.testing.assert_allclose(other[i], table[ids].mean(axis=0), rtol=1e-6)
    capsys.readouterr()
    assert main(["tokenizer", str(run), *flags]) == 2
    assert "already contains a run" in capsys.readouterr().err


def test_a_run_that_is_compared_with_its_base_keeps_its_tokens(run, tokenizer, tmp_path):
    loaded = load_run(run)
    config = dataclasses.replace(loaded.config, task=TaskConfig(kind="dpo"), init_from="base")
    with pytest.raises(UserError, match=r"task.kind=dpo needs the run that it started from.* vocabulary of base"):
        write_with_vocabulary(dataclasses.replace(loaded, config=config), tmp_path / "new", tokenizer, [])
    assert not (tmp_path / "new").exists()


def test_the_report_counts_bytes_words_and_unused_tokens(run, tokenizer, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the sea, the sea é")
    (tmp_path / "b.txt").write_text("sky " * 50)
    flags = ["--data.path", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--show", "3"]
    assert main(["tokenizer", str(run), *flags]) == 0
    printed = capsys.readouterr().out
    ids = tokenizer.encode("the sea, the sea é")
    assert f"{tmp_path / 'a.txt'}: 19 bytes, 5 words" in printed
    assert f"{len(ids):,} tokens  {19 / len(ids):6.3f} bytes per token  {len(ids) / 5:6.3f} tokens per word" in printed
    used = {*ids.tolist(), *tokenizer.encode("sky " * 50).tolist()}
    assert f"unused: {tokenizer.vocab_size - 1 - len(used)} of {tokenizer.vocab_size - 1} tokens" in printed
    assert printed.count("long: ") == 3
    assert main(["tokenizer", str(run), *flags, "--characters", "8"]) == 0
    assert main(["tokenizer", str(run), *flags, "--extend", "5"]) == 2
    assert "need --to" in capsys.readouterr().err


def test_a_tokenizer_learns_from_the_share_of_documents_that_is_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"word{i}x " * 9}) + "\n" for i in range(400)))
    data = DataConfig(path=(str(tmp_path / "a.jsonl"),))
    lines, sizes = [], []
    for options in ({}, {"sample_fraction": 0.25}):
        config = TokenizerConfig(kind="bpe", vocab_size=5000, **options)
        prepared = prepare(data, config, tmp_path, report=lines.append)
        sizes.append(prepared.tokenizer.vocab_size)
    assert sizes[1] < 0.7 * sizes[0]
    [line] = [line for line in lines if "sample of" in line]
    assert 0.15 < int(line.split("sample of ")[1].split()[0]) / prepared.dataset.train.n_documents < 0.35
