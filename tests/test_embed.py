"""Vectors of texts: layers, pooling, and the files of `gptjax embed`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.json
import pyarrow.parquet
import pytest

from gptjax.api import Model
from gptjax.checkpoints.run_dir import LoadedRun, write_run
from gptjax.cli import main
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.task import AdapterConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.evaluation.embeddings import EmbeddingOptions, embed_decoding, embed_ids
from gptjax.generation.decode import prepare
from gptjax.model.gpt import Compute, apply_blocks, embed_tokens
from gptjax.model.inputs import BlockInputs
from gptjax.model.inside import look_inside
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.test_adapters import adapted
from tests.test_decode import make_params

MODEL = ModelConfig(n_layer=3, n_head=2, n_embd=16, block_size=32, vocab_size=257)


@pytest.fixture(scope="module")
def run():
    return LoadedRun(
        Config(model=MODEL, tokenizer=TokenizerConfig(kind="bytes")), make_params(MODEL), ByteTokenizer(), 0
    )


def test_a_layer_after_a_prompt_is_that_of_decoding():
    model, params = adapted("prompt")
    texts, decoding = [np.arange(n, dtype=np.int32) for n in (5, 9)], prepare(model, params, SampleConfig(), 2)
    for layer in (0, 1):
        options = EmbeddingOptions(layer, "mean")
        found = embed_ids(model, params, texts, options, Compute(unroll=1))
        np.testing.assert_allclose(found, embed_decoding(decoding, texts, options), atol=1e-5)
    without = dataclasses.replace(model, adapter=AdapterConfig())
    plain = embed_ids(without, {k: v for k, v in params.items() if k != "prompt"}, texts, options, Compute(unroll=1))
    assert np.abs(found - plain).max() > 1e-3, "the text attends to the prompt"


def test_a_layer_gives_the_residual_stream_after_so_many_blocks(run):
    texts = [np.arange(n, dtype=np.int32) for n in (5, 9, 20)]

    def found(layer, pooling):
        options = EmbeddingOptions(layer, pooling)
        return embed_ids(MODEL, run.params, texts, options, Compute(unroll=1), batch_size=2)[1]

    positions = jnp.arange(9)[None]
    one = dataclasses.replace(MODEL, n_layer=1)
    apply = jax.jit(
        lambda params, x: apply_blocks(one, params, x, BlockInputs(positions), compute=Compute(unroll=1))[0]
    )
    x_1TD = jax.jit(lambda params: embed_tokens(MODEL, params, texts[1][None], positions))(run.params)
    streams = [np.asarray(x_1TD)[0]]
    for layer in range(MODEL.n_layer):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer : layer + 1], run.params["blocks"])
        x_1TD = apply(run.params | {"blocks": block}, x_1TD)
        streams.append(np.asarray(x_1TD)[0])
    tolerance = {"atol": 1e-4}  # sums in another order, of values up to 5
    np.testing.assert_allclose(found(0, "mean"), streams[0].mean(0), **tolerance)
    np.testing.assert_allclose(found(1, "last"), streams[1][-1], **tolerance)
    np.testing.assert_allclose(found(3, "mean"), streams[3].mean(0), **tolerance)
    whole = found(-1, "mean")
    np.testing.assert_allclose(whole, Model(run).embed(texts[1]), **tolerance)
    assert np.abs(whole - streams[3].mean(0)).max() > 1e-2  # the final norm


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_that_read_earlier_ones_keep_their_place(layer):
    """The lower layers alone are paired and of the kinds that they have in the whole model."""
    across = {"learned_skips": True, "value_residual": True}
    model = dataclasses.replace(MODEL, **across, attention_pattern=("local", "full"), attention_window=3)
    params, text = make_params(model), np.arange(9, dtype=np.int32)
    expected = jax.jit(look_inside, static_argnums=0)(model, params, text[None]).streams_NBTD[layer, 0, -1]
    options = EmbeddingOptions(layer, "last")
    [found] = embed_ids(model, params, [text], options, Compute(unroll=1))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    decoding = prepare(model, params, SampleConfig(compute_dtype="float32"), 2)
    [found] = embed_decoding(decoding, [text], options)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_rows_get_the_vectors_of_the_model(run, tmp_path, capsys):
    run_dir = tmp_path / "run"
    write_run(run_dir, run.config, run.params, run.tokenizer)
    texts = ["abc", "some words", "x" * 300]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"body": text, "embedding": n}) + "\n" for n, text in enumerate(texts)))
    expected = Model(run).embed(["abc", "some words", "x" * 31], "last", normalized=True, layer=1)
    args = ["embed", "--run_dir", str(run_dir), "--file", str(source), "--text_field", "body", "--pooling", "last"]
    for ending in ("npy", "jsonl", "parquet"):
        out = tmp_path / f"out.{ending}"
        more = ["--normalized", "true", "--layer", "1", "--batch_size", "2", "--out", str(out)]
        assert main([*args, *more]) == 0
        assert "1 of 3 texts were cut at model.block_size=32" in capsys.readouterr().err
        if ending == "npy":
            found = np.load(out, allow_pickle=False)
        else:
            rows = pyarrow.json.read_json(out) if ending == "jsonl" else pyarrow.parquet.read_table(out)
            assert rows["input.embedding"].to_pylist() == [0, 1, 2] and rows["body"].to_pylist() == texts
            found = np.array(rows["embedding"].to_pylist(), np.float32)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert main([*args, "--layer", "9", "--out", str(out)]) == 2
    assert "layer=9 must lie in [-1, 3]" in capsys.readouterr().err


def test_fields_that_appear_later_are_not_dropped_from_parquet(run, tmp_path, capsys, monkeypatch):
    run_dir, source, out = tmp_path / "run", tmp_path / "in.jsonl", tmp_path / "out.parquet"
    write_run(run_dir, run.config, run.params, run.tokenizer)
    args = ["embed", "--run_dir", str(run_dir), "--file", str(source), "--out", str(out)]
    monkeypatch.setattr("gptjax.verbs.embed.CHUNK", 2)
    rows = [{"text": "a", "n": 1}, {"text": "b", "m": "x"}, {"text": "c", "n": 3}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(args) == 0
    assert pyarrow.parquet.read_table(out)["n"].to_pylist() == [1, None, 3]
    out.unlink()
    for last in ({"text": "c", "new": 1}, {"text": "c", "n": "three"}):
        source.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], last]))
        assert main(args) == 2
        assert "write .jsonl" in capsys.readouterr().err
        assert not out.exists()
