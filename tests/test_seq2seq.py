"""Encoder and decoder, held to transformers' T5; cached decoding and beams, held to the whole model."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.batches.pairs import PairBatch, PairBatches, encode_pairs
from gptjax.batches.rows import take_rows
from gptjax.checkpoints.run_dir import load_run
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.mesh import MeshConfig
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.errors import UserError
from gptjax.evaluation.text_scores import text_scores
from gptjax.generation.targets import search_targets
from gptjax.model import gpt
from gptjax.model.gpt import Compute
from gptjax.model.loss import batch_loss, batch_states, loss_options
from gptjax.parallel.mesh import batch_sharding, make_mesh, traced_in
from gptjax.parallel.rules import shardings
from gptjax.tasks.registry import read_examples
from gptjax.text.tokenizers.plain import ByteTokenizer, CharTokenizer
from gptjax.training import trainer
from gptjax.verbs.evaluate import evaluate_run
from tests.tiny import replace, rows, run_config

T5 = {"norm": "rms", "norm_epsilon": 1e-6, "bias": False, "activation": "relu", "positions": "t5"}
MODEL = ModelConfig(
    **T5,
    **{"vocab_size": 11, "block_size": 40, "n_layer": 2, "encoder_layers": 3, "n_head": 4, "n_embd": 16},
    **{"head_dim": 6, "mlp_width": 24, "attention_scale": 1.0, "logit_scale": 0.25},
)
END = 10


@functools.cache
def drawn(model: ModelConfig = MODEL) -> dict:
    params = jax.jit(gpt.init_params, static_argnums=0)(model, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(1)
    return jax.tree.unflatten(tree, [jnp.asarray(x + random.normal(0, 0.3, x.shape), "float32") for x in leaves])


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch):
    return gpt.logits(model, params, batch_states(model, Compute(unroll=1), params, batch))


def make_batch(sources, targets, S=40, T=40) -> PairBatch:
    batch = PairBatches(
        [(np.array([*s, END], np.int32), np.array([*t, END], np.int32)) for s, t in zip(sources, targets, strict=True)],
        *(END, 4, 0),
    )
    inputs = np.zeros((len(sources), T), np.int32)
    source, wanted = np.zeros((len(sources), S), np.int32), np.full((len(sources), T), -1, np.int32)
    for row, (s, t) in enumerate(batch.pairs):
        source[row, : len(s)], inputs[row, : len(t)], wanted[row, : len(t)] = s, [END, *t[:-1]], t
    return PairBatch(inputs, wanted, source, np.array([len(s) for s, _ in batch.pairs], np.int32))


SOURCES = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 1, 1, 5, 6, 7], [4, 4, 2], [9]]
TARGETS = [[3, 1], [2, 2, 2, 5, 6, 7, 1, 2, 3, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1], [7, 7, 7, 7]]


@functools.cache
def t5():
    """The same numbers in transformers' T5."""
    torch = pytest.importorskip("torch", reason="needs the extra hf")
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = transformers.T5Config(
        **{"vocab_size": 11, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2},
        **{"num_heads": 4, "dropout_rate": 0.0, "feed_forward_proj": "relu", "tie_word_embeddings": True},
        **{"decoder_start_token_id": END, "eos_token_id": END, "pad_token_id": 0},
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    params = jax.tree.map(np.asarray, drawn())
    for name in ("blocks", "encoder"):  # T5 has one table of distances for all layers
        attn = (params["encoder"]["blocks"] if name == "encoder" else params["blocks"])["attn"]
        attn["distances"] = np.broadcast_to(attn["distances"][:1], attn["distances"].shape)
    state = {"shared.weight": params["embed"]["tokens"], "lm_head.weight": params["embed"]["tokens"]}
    for stack, blocks, norm in (
        ("encoder", params["encoder"]["blocks"], params["encoder"]["norm_f"]),
        ("decoder", params["blocks"], params["norm_f"]),
    ):
        state[f"{stack}.embed_tokens.weight"] = params["embed"]["tokens"]
        state[f"{stack}.final_layer_norm.weight"] = norm["scale"]
        for layer in range(len(blocks["norm_1"]["scale"])):
            at = f"{stack}.block.{layer}.layer"
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
            qkv = one["attn"]["w_qkv"].reshape(16, 4, 3, 6)
            for number, letter in enumerate("qkv"):
                state[f"{at}.0.SelfAttention.{letter}.weight"] = qkv[:, :, number].reshape(16, 24).T
            state[f"{at}.0.SelfAttention.o.weight"] = one["attn"]["w_out"].T
            state[f"{at}.0.layer_norm.weight"] = one["norm_1"]["scale"]
            if layer == 0:
                state[f"{at}.0.SelfAttention.relative_attention_bias.weight"] = one["attn"]["distances"]
            last = 1
            if stack == "decoder":
                last, cross = 2, one["cross"]
                state[f"{at}.1.EncDecAttention.q.weight"] = cross["w_q"].reshape(16, 24).T
                state[f"{at}.1.EncDecAttention.k.weight"] = cross["w_kv"][:, :, 0].reshape(16, 24).T
                state[f"{at}.1.EncDecAttention.v.weight"] = cross["w_kv"][:, :, 1].reshape(16, 24).T
                state[f"{at}.1.EncDecAttention.o.weight"] = cross["w_out"].T
                state[f"{at}.1.layer_norm.weight"] = one["norm_cross"]["scale"]
            state[f"{at}.{last}.DenseReluDense.wi.weight"] = one["mlp"]["w_in"].T
            state[f"{at}.{last}.DenseReluDense.wo.weight"] = one["mlp"]["w_out"]
            state[f"{at}.{last}.layer_norm.weight"] = one["norm_2"]["scale"]
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in state.items()})
    return torch, model, jax.tree.map(jnp.asarray, params)


def test_logits_are_those_of_t5():
    torch, model, params = t5()
    batch = make_batch(SOURCES, TARGETS)
    seen = torch.tensor(np.arange(40)[None] < batch.lengths[:, None])
    ids = {"input_ids": torch.tensor(batch.source), "decoder_input_ids": torch.tensor(batch.inputs)}
    with torch.no_grad():
        expected = model(**{name: x.long() for name, x in ids.items()}, attention_mask=seen).logits.numpy()
    actual = np.asarray(logits_of(MODEL, params, batch))
    for row, target in enumerate(TARGETS):
        n = len(target) + 1
        np.testing.assert_allclose(actual[row, :n], expected[row, :n], atol=1e-4)


def test_greedy_targets_are_those_of_t5():
    torch, model, params = t5()
    for source in SOURCES:
        with torch.no_grad():
            found = model.generate(torch.tensor([[*source, END]]), max_new_tokens=12, do_sample=False, num_beams=1)
        expected = found[0, 1:].tolist()
        expected = expected[: expected.index(END)] if END in expected else expected
        [actual] = search_targets(MODEL, params, [np.array([*source, END])], 1, 12, END)
        assert actual.tolist() == expected


def test_padding_on_either_side_changes_nothing():
    params, batch = drawn(), make_batch(SOURCES, TARGETS)
    together = np.asarray(logits_of(MODEL, params, batch))
    other = batch._replace(source=np.where(np.arange(40)[None] < batch.lengths[:, None], batch.source, 3))
    np.testing.assert_array_equal(logits_of(MODEL, params, other), together)
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        alone = make_batch([source], [target], len(source) + 1, len(target) + 1)
        found = logits_of(MODEL, params, alone)[0]
        np.testing.assert_allclose(found, together[row, : len(target) + 1], atol=1e-5)  # sums in another order


def test_a_target_sees_the_source_and_what_comes_before_it():
    params, batch = drawn(), make_batch(SOURCES[:1], TARGETS[1:2], S=18, T=21)
    before = np.asarray(logits_of(MODEL, params, batch))
    for place in (0, 17):
        source = batch.source.copy()
        source[0, place] = 5 - (source[0, place] == 5)
        changed = logits_of(MODEL, params, batch._replace(source=source))
        assert (np.abs(changed - before).max(axis=(0, 2)) > 0).all()
    inputs = batch.inputs.copy()
    inputs[0, 9] = 0
    changed = np.abs(np.asarray(logits_of(MODEL, params, batch._replace(inputs=inputs))) - before).max(axis=(0, 2))
    assert not changed[:9].any() and (changed[9:] > 0).all()


@pytest.mark.parametrize("positions", ["t5", "rope", "learned"])
def test_cached_decoding_is_the_whole_model(positions):
    model = dataclasses.replace(MODEL, positions=positions)
    params = drawn(model)
    ends = [np.array([*source, END]) for source in SOURCES]
    found = search_targets(model, params, ends, 1, 8, END)
    for source, target in zip(SOURCES, found, strict=True):
        tokens = []
        while len(tokens) < 8:
            logits_TV = logits_of(model, params, make_batch([source], [tokens]))[0]
            tokens.append(int(logits_TV[len(tokens)].argmax()))
            if tokens[-1] == END:
                break
        assert target.tolist() == [token for token in tokens if token != END]


def test_enough_beams_find_the_best_of_all_targets():
    steps, words = 3, [w for n in range(3) for w in itertools.product(range(END), repeat=n)]
    whole = [*((*word, END) for word in words), *itertools.product(range(END), repeat=steps)]
    for source in SOURCES[1:]:
        batch = make_batch([source] * len(whole), [t if END not in t else t[:-1] for t in whole], T=4)
        logits = np.asarray(logits_of(MODEL, drawn(), batch), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        means = [np.mean([log_p[i, t, token] for t, token in enumerate(target)]) for i, target in enumerate(whole)]
        best = [token for token in whole[int(np.argmax(means))] if token != END]
        [found] = search_targets(MODEL, drawn(), [np.array([*source, END])], 120, steps, END)
        assert found.tolist() == best
        [greedy] = search_targets(MODEL, drawn(), [np.array([*source, END])], 1, steps, END)
        assert len(greedy) <= steps


@pytest.mark.slow
def test_the_loss_does_not_depend_on_mesh_and_remat():
    params, batch = drawn(), make_batch(SOURCES[:2], TARGETS[:2], S=20, T=24)
    options = loss_options(MODEL)

    def gradient(compute):
        return lambda params, batch: jax.grad(lambda p: batch_loss(MODEL, options, compute, p, batch, None).objective)(
            params
        )

    expected = jax.jit(gradient(Compute(unroll=1)))(params, batch)
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    sharded = jax.device_put(params, shardings(mesh, params)), jax.device_put(batch, batch_sharding(mesh))
    actual = jax.jit(traced_in(mesh, gradient(Compute(unroll=1, remat="full"))))(*sharded)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * max(1.0, float(np.abs(b).max())))
    assert all(float(np.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(expected))  # all parameters learn


def test_every_pair_comes_once_an_epoch_whatever_the_rows():
    pairs, cut = encode_pairs([("a" * n, "b" * (20 - n)) for n in range(1, 14)], ByteTokenizer(), 12)
    assert cut == 10 and max(len(side) for pair in pairs for side in pair) == 12
    batches = PairBatches(pairs, 256, 12, seed=3)
    numbers = [first for step in range(13) for first, _ in batches.documents(step, 2)]
    assert sorted(numbers[:13]) == sorted(numbers[13:26]) == list(range(13)) and numbers[:13] != numbers[13:26]
    whole = batches.batch(4, 4)
    for x, y in zip(take_rows(whole, np.array([1, 3])), batches.batch(4, 4, np.array([1, 3])), strict=True):
        np.testing.assert_array_equal(x, y)
    found = list(batches.ordered(5))
    assert sum(int((batch.targets >= 0).sum()) for batch in found) == sum(len(pair.target) for pair in pairs)
    with pytest.raises(UserError, match=r"needs a tokenizer with <\|endoftext\|>"):
        encode_pairs([("a", "a")], CharTokenizer("a", has_end_of_text=False), 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abc"), 4)) for _ in range(60)]
    rows = "".join(json.dumps({"from": text, "to": text[::-1]}) + "\n" for text in texts)
    (folder / "pairs.jsonl").write_text(rows)
    train = {"num_steps": 2, "eval_every": 0, "eval_windows": 512, "micro_batch_size": 4}
    config = run_config(folder, train=train)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoder_layers=1, n_layer=1, block_size=16),
        task=TaskConfig(kind="seq2seq", source_field="from", target_field="to"),
        data=DataConfig(path=(str(folder / "pairs.jsonl"),)),
    )
    assert trainer.train(config) == 0
    return config


@pytest.mark.slow
def test_a_run_writes_targets_and_is_measured(run, capsys):
    [row] = [row for row in rows(run) if "val_loss" in row]
    found = evaluate_run(EvaluateConfig(run_dir=run.run_dir))
    assert found.startswith(f"loss {row['val_loss']:.4f} ")
    pytest.importorskip("rouge_score", reason="needs the extra evaluate")
    _, scored, *_ = written = evaluate_run(
        EvaluateConfig(run_dir=run.run_dir, generate=True, max_new_tokens=5, batch_size=3)
    ).splitlines()
    model, [held_out] = gptjax.load(run.run_dir), [read_examples(run.task, run.data).validation]
    texts = [model.generate(pair.source, temperature=0.0, max_new_tokens=5)[0][0] for pair in held_out]
    rows_file, written_file = Path(run.run_dir, "rows.jsonl"), Path(run.run_dir, "written.jsonl")
    rows_file.write_text("".join(json.dumps({"x": pair.source, "target": "kept"}) + "\n" for pair in held_out))
    options = ["--data.text_field", "x", "--output_field", "target", "--max_new_tokens", "5", "--batch_size", "3"]
    assert (
        main(["predict", "--run_dir", run.run_dir, "--file", str(rows_file), "--out", str(written_file), *options]) == 0
    )
    assert [json.loads(line) for line in written_file.read_text().splitlines()] == [
        {"x": pair.source, "input.target": "kept", "target": text.strip()}
        for pair, text in zip(held_out, texts, strict=True)
    ]
    exact = np.mean([text.strip() == pair.target for text, pair in zip(texts, held_out, strict=True)])
    assert written[0].startswith(f"exact match {exact:.4f}") and f"· {len(held_out)} items" in written[0]
    assert scored == f"scores      {text_scores([text.strip() for text in texts], [[p.target] for p in held_out])}"
    beams = {"num_beams": 3, "temperature": 0.0, "max_new_tokens": 5}
    both = model.generate(["abca", "b"], **beams)
    assert both == [*model.generate("abca", **beams), *model.generate("b", **beams)]
    with pytest.raises(UserError, match=r"temperature=0.5 has no effect without"):
        model.generate(["abca"], temperature=0.5)
    with pytest.raises(UserError, match="logits and states need a source and a target"):
        model.logits("abca")
    assert {"blocks", "norm_f"} == set(load_run(Path(run.run_dir)).params["encoder"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": TaskConfig(kind="seq2seq")}, "task.kind=seq2seq needs model.encoder_layers"),
        ({"model": {"encoder_layers": 2}}, "model.encoder_layers=2 has no effect with task.kind=pretrain"),
        ({"model": {"encoder_layers": 2, "parallel": "one_norm"}}, "model.parallel=one_norm does not go with"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(Config(), **change)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"from": "a"}, r"pairs.jsonl:2: no field 'to'"),
        ({"from": " ", "to": "b"}, r"pairs.jsonl:2: field 'from' is an empty text"),
    ],
)
def test_a_pair_without_a_side_is_named(run, tmp_path, row, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"from": "a", "to": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        trainer.train(dataclasses.replace(run, data=DataConfig(path=(str(path),)), run_dir=str(tmp_path / "run")))
