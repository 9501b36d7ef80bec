"""Whole runs that fine-tune: what learns and what stays, going on, using and merging the result."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.labelled import TextBatch, TextBatches, encode_texts
from gptjax.batches.multi import MultiBatches
from gptjax.batches.packed import PackedSequences, encode_words
from gptjax.checkpoints.run_dir import load_run
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.mixtures import PartConfig
from gptjax.config.reader import load_config
from gptjax.config.run import Config
from gptjax.config.task import AdapterConfig, FinetuneConfig, TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.evaluation.labels import LabelScores
from gptjax.exchange.hf_model import import_model
from gptjax.model.adapters import merge_lora
from gptjax.model.gpt import Compute
from gptjax.report.metrics import read_metrics
from gptjax.tasks.registry import make_loss, make_part_loss, parts_of
from gptjax.tasks.trainable import join, rates, split
from gptjax.text.labelled import Text, Words
from gptjax.text.tokenizer import make_tokenizer
from gptjax.training import trainer
from gptjax.training.step import make_train_step
from tests.tiny import assert_trees_equal, hidden_states, init_all, init_state, replace, run_config, untrained_run

METHODS = {
    "all": ("all", AdapterConfig(), {}),
    "head": ("new", AdapterConfig(), {}),
    "top": ("top", AdapterConfig(), {"top_k": 1}),
    "paths": ("paths", AdapterConfig(), {"paths": ("norm_", "mlp/b_in")}),
    "lora": ("new", AdapterConfig(kind="lora", rank=2, dropout=0.1), {}),
    "bottleneck": ("new", AdapterConfig(kind="bottleneck", rank=2), {}),
    "prompt": ("new", AdapterConfig(kind="prompt", tokens=2), {}),
    "prefix": ("new", AdapterConfig(kind="prefix", tokens=2), {}),
}
ADAPTERS = ("lora", "bottleneck", "prompt", "prefix")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Labelled files and a base run that the tests of this module share; texts have 17 to 32 tokens, so that one
    program is compiled.
    """
    folder = tmp_path_factory.mktemp("finetune")
    config = run_config(folder, train={"num_steps": 2})
    assert trainer.train(config) == 0
    (folder / "run").rename(folder / "base")
    random = np.random.default_rng(0)
    for name, size in (("train", 40), ("validation", 13)):
        texts, sentences = [], []
        for n in range(size):
            words = random.choice(["aaa", "bbb"] if n % 2 else ["ccc", "bbb"], random.integers(4, 7)).tolist()
            texts.append({"text": " ".join(words) + " ac"[n % 2], "label": "ab"[n % 2]})
            sentences.append("".join(f"{word}\t{'B-X' if word == 'bbb' else 'O'}\n" for word in words))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        (folder / f"{name}.conll").write_text("\n".join(sentences))
        chats = [{"prompt": row["text"], "response": row["label"]} for row in texts]
        (folder / f"{name}-chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return folder


def make_config(folder: Path, name: str, ending: str = ".jsonl", task: dict | None = None, **sections) -> Config:
    """A run over the base, with the methods of `METHODS` by the first word of its name."""
    train, adapter, more = METHODS[name.partition("-")[0]]
    config = run_config(folder)
    kind = {"validation_path": (str(folder / f"validation{ending}"),), "kind": "classify"} | (task or {})
    config = dataclasses.replace(
        config,
        run_dir=str(folder / "runs" / name),
        init_from=str(folder / "base"),
        task=TaskConfig(**kind),
        finetune=FinetuneConfig(train=train, **more),
        data=DataConfig(path=(str(folder / f"train{ending}"),)),
        model=dataclasses.replace(config.model, adapter=adapter),
        train=dataclasses.replace(config.train, num_steps=4, eval_windows=512, eval_every=0, save_every=2),
    )
    return replace(config, **sections)


@pytest.fixture(scope="module")
def trained(folder):
    """Runs by method, each trained once."""
    done = {}

    def get(name: str) -> Config:
        if name not in done:
            done[name] = make_config(folder, name)
            assert trainer.train(done[name]) == 0
        return done[name]

    return get


def base_params(folder) -> dict:
    return load_run(folder / "base").params


def flat(tree) -> dict:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_keeps_its_bits_and_what_learns_changes(folder, trained, method):
    config = trained(method)
    before, after = flat(base_params(folder)), flat(load_run(Path(config.run_dir), "latest").params)
    learning, frozen = split(config, load_run(Path(config.run_dir), "latest").params)
    for name, leaf in flat(frozen).items():
        part = before[name][: len(leaf)]  # of a stack that is cut, what lies below
        np.testing.assert_array_equal(leaf, part, err_msg=name)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    expected = {
        "all": set(before),
        "top": {name for name in before if name.startswith(("blocks/", "norm_f/"))},
        "paths": {name for name in before if "norm_" in name or name.endswith("mlp/b_in")},
    }.get(method, set())
    assert changed == expected
    start = flat(split(config, init_all(config, jax.random.key(config.seed), base_params(folder)))[0])
    still = {name for name, leaf in flat(learning).items() if np.array_equal(leaf, start[name])}
    assert not still


# A part of a stack, and an adapter before the blocks; in them, with dropout, and chosen by path.
@pytest.mark.parametrize(
    "method",
    ["top", "prompt", pytest.param("lora", marks=pytest.mark.slow), pytest.param("paths", marks=pytest.mark.slow)],
)
def test_going_on_gives_the_same_bits(folder, trained, method):
    config = trained(method)
    again = dataclasses.replace(config, run_dir=str(folder / "again" / method))
    shutil.copytree(config.run_dir, again.run_dir)
    shutil.rmtree(Path(again.run_dir) / "checkpoints" / "00000004")  # as if it had ended after step 2
    assert load_run(Path(again.run_dir), "latest").step == 2
    assert trainer.train(again) == 0
    whole, interrupted = (load_run(Path(c.run_dir), "latest") for c in (config, again))
    assert (whole.step, interrupted.step) == (4, 4)
    assert_trees_equal(interrupted.params, whole.params)


@pytest.mark.parametrize("method", ["head", "top", *ADAPTERS])
def test_moments_are_only_of_what_learns(folder, method):
    config = replace(make_config(folder, method, task={"labels": ("a", "b")}), model={"vocab_size": 257})
    given = base_params(folder)
    state = jax.eval_shape(lambda given: init_state(config, given), given)
    learning = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments == 2 * learning + 1
    whole = jax.eval_shape(lambda given: init_all(config, jax.random.key(0), given), given)
    assert learning + sum(leaf.size for leaf in jax.tree.leaves(state.frozen)) == sum(
        leaf.size for leaf in jax.tree.leaves(whole)
    )


@pytest.mark.parametrize("method", ["top", "prompt"])
def test_checkpoints_hold_only_what_learns(folder, trained, method):
    config = trained(method)
    newest = [sorted((run / "checkpoints").iterdir())[-1] for run in (Path(config.run_dir), folder / "base")]
    size, base_size = (sum(path.stat().st_size for path in n.rglob("*") if path.is_file()) for n in newest)
    assert size < base_size


@pytest.mark.slow
def test_what_is_frozen_costs_no_gradient(folder, trained):
    def flops(method: str) -> float:
        config = load_config(Path(trained(method).run_dir) / "config.yaml")
        config = replace(config, train={"unroll": 0})  # operations in a loop would be counted once
        state = jax.eval_shape(lambda given: init_state(config, given), base_params(folder))
        batch = jax.tree.map(lambda x: x[None], make_task_batch(config))
        return jax.jit(make_train_step(config)).lower(state, batch).compile().cost_analysis()["flops"]

    whole, head, top, lora = (flops(method) for method in ("all", "head", "top", "lora"))
    assert head < 0.45 * whole  # of three parts, forward and two backward, only the first is left
    assert head < top < 0.8 * whole
    assert lora < 0.9 * whole  # no gradient of the weights


def make_task_batch(config: Config):
    rows, T = config.train.batch_size, 32
    return TextBatch(
        np.zeros((rows, T), np.int32), np.full(rows, T, np.int32), np.zeros(rows, np.int32), np.ones(rows, np.float32)
    )


def test_split_and_join_are_each_others_inverse(folder):
    for method in METHODS:
        config = replace(make_config(folder, method, task={"labels": ("a", "b")}), model={"vocab_size": 257})
        shapes = jax.eval_shape(lambda config=config: init_all(config, jax.random.key(1)))
        params = jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).random(leaf.shape, np.float32), shapes)
        assert_trees_equal(join(*split(config, params)), params)
        assert flat(split(config, params)[0]).keys() >= {"heads/classify/w", "heads/classify/bias"}


def test_deeper_layers_learn_slower_and_the_head_at_its_own_rate(folder, trained):
    config = load_config(Path(trained("all").run_dir) / "config.yaml")
    config = replace(config, finetune={"layer_decay": 0.5, "head_learning_rate": 10 * config.optim.learning_rate})
    params = init_all(config, jax.random.key(1))
    found = rates(config, params)
    assert found is not None
    assert found["heads"]["classify"]["w"] == pytest.approx(10)
    assert found["norm_f"]["scale"] == 1 and found["embed"]["tokens"] == 0.25
    np.testing.assert_array_equal(found["blocks"]["mlp"]["w_in"].ravel(), [0.5, 1.0])
    state = init_state(config, base_params(folder))
    step = jax.jit(make_train_step(config))
    batch = jax.tree.map(lambda x: x[None], make_task_batch(config))
    plain = jax.jit(make_train_step(replace(config, finetune={"layer_decay": 1.0, "head_learning_rate": 0.0})))
    moved, expected = (jax.tree.map(jnp.subtract, run(state, batch)[0].params, state.params) for run in (step, plain))
    np.testing.assert_allclose(moved["heads"]["classify"]["w"], 10 * expected["heads"]["classify"]["w"], rtol=1e-3)
    ratio = np.abs(moved["blocks"]["mlp"]["w_in"]).sum(axis=(1, 2)) / np.abs(expected["blocks"]["mlp"]["w_in"]).sum(
        axis=(1, 2)
    )
    np.testing.assert_allclose(ratio, [0.5, 1.0], rtol=1e-3)


def test_an_adapter_of_another_base_is_refused(folder, trained, tmp_path):
    config = trained("lora")
    other = untrained_run(tmp_path)
    with pytest.raises(UserError, match=r"was trained with another base than .*base.json identifies"):
        load_run(Path(config.run_dir), base_dir=other.run_dir)
    broken = tmp_path / "broken"
    shutil.copytree(config.run_dir, broken)
    for content in ("", "{", "[]", "{}", "3"):
        (broken / "base.json").write_text(content)
        with pytest.raises(UserError, match=r"base.json: cannot be read .*; restore it, or train again"):
            load_run(broken)
    moved = tmp_path / "moved"
    shutil.copytree(folder / "base", moved)
    assert_trees_equal(
        load_run(Path(config.run_dir), base_dir=str(moved)).params, load_run(Path(config.run_dir)).params
    )
    with pytest.raises(UserError, match="needs no base"):
        load_run(Path(trained("all").run_dir), base_dir=str(moved))


def test_an_adapter_over_an_adapter_is_refused(folder, trained):
    config = make_config(folder, "head-over", init_from=trained("lora").run_dir)
    with pytest.raises(UserError, match="has a lora adapter of its own"):
        trainer.train(config)


def test_export_merges_lora(folder, trained, tmp_path, capsys):
    run_dir = trained("lora").run_dir
    assert main(["export", run_dir, "--to", str(tmp_path / "no")]) == 2
    assert "add --merge" in capsys.readouterr().err
    assert main(["export", run_dir, "--to", str(tmp_path / "hf"), "--merge"]) == 0
    assert "the head classify is left out" in capsys.readouterr().err
    run, imported = load_run(Path(run_dir)), import_model(tmp_path / "hf", lambda message: None)
    tokens = jnp.arange(12)[None]
    before = hidden_states(run.config.model, run.params, tokens, tokens)
    after = hidden_states(imported.model, imported.params, tokens, tokens)
    np.testing.assert_allclose(before, after, atol=2e-5)
    model, merged = merge_lora(run.config.model, run.params)
    assert model.adapter.kind == "none" and "adapters" not in merged
    assert main(["export", trained("prompt").run_dir, "--to", str(tmp_path / "no")]) == 2
    assert "has a prompt adapter" in capsys.readouterr().err
    assert main(["export", trained("top").run_dir, "--to", str(tmp_path / "no"), "--merge"]) == 2
    assert "merge needs a lora adapter" in capsys.readouterr().err


def test_predict_streams_rows_in_their_order(folder, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gptjax.verbs.predict.CHUNK", 5)
    run_dir, source, out = trained("lora").run_dir, folder / "validation.jsonl", tmp_path / "out.jsonl"
    assert main(["predict", "--run_dir", run_dir, "--file", str(source), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in rows] == [json.loads(line)["text"] for line in source.read_text().splitlines()]
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(row["probabilities"], key=row["probabilities"].get)
    capsys.readouterr()
    assert main(["predict", "--run_dir", run_dir, "--text", rows[0]["text"], rows[7]["text"]]) == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, expected in zip(alone, (rows[0], rows[7]), strict=True):
        assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=2e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", " "], "text 1: field 'text' is an empty text"),
        (["--file", "{folder}/none.jsonl"], "no such file"),
        ([], "give either --text TEXT or --file FILE"),
        (["--text", "a", "--out", "x"], "out='x' has no effect without file"),
    ],
)
def test_wrong_input_to_predict_is_one_line(folder, trained, capsys, args, message):
    filled = [arg.replace("{folder}", str(folder)) for arg in args]
    assert main(["predict", "--run_dir", trained("lora").run_dir, *filled]) == 2
    assert message in capsys.readouterr().err
    assert main(["predict", "--run_dir", str(folder / "base"), "--text", "a"]) == 2
    assert "which has no labels; use gptjax sample" in capsys.readouterr().err


def test_evaluate_prints_the_table(folder, trained, tmp_path, capsys):
    run_dir = trained("all").run_dir
    figure = tmp_path / "confusion.png"
    capsys.readouterr()
    assert main(["evaluate", "--run_dir", run_dir, "--figure", str(figure)]) == 0
    own = capsys.readouterr().out
    assert figure.read_bytes()[:4] == b"\x89PNG"
    best = min((row for row in read_metrics(Path(run_dir)) if "val_loss" in row), key=lambda row: row["val_loss"])
    assert f"loss {best['val_loss']:.4f} · accuracy {best['accuracy']:.4f} · macro F1 {best['macro_f1']:.4f}" in own
    assert "calibration error" in own and "(predicted)" in own
    assert main(["evaluate", "--run_dir", run_dir, "--data.path", str(folder / "validation.jsonl")]) == 0
    assert capsys.readouterr().out.startswith(own)
    (tmp_path / "other.jsonl").write_text('{"text": "x", "label": "c"}\n')
    assert main(["evaluate", "--run_dir", run_dir, "--data.path", str(tmp_path / "other.jsonl")]) == 2
    assert "other.jsonl:1: label 'c' is unseen in training" in capsys.readouterr().err
    assert main(["evaluate", "--run_dir", run_dir, "--windows", "3"]) == 2


@pytest.mark.slow
def test_a_head_for_the_same_labels_is_kept_in_the_order_of_the_new_run(folder, trained, capsys):
    base = load_run(Path(trained("all").run_dir))
    still = {"learning_rate": 0.0, "min_learning_rate": 0.0}
    labels = base.config.task.labels
    for name, task in (("same", {}), ("turned", {"labels": labels[::-1]})):
        config = make_config(folder, f"all-{name}", task=task, optim=still, init_from=trained("all").run_dir)
        assert trainer.train(replace(config, train={"num_steps": 1})) == 0
        assert f"head        classify: kept from {config.init_from}, 2 labels" in capsys.readouterr().out
        head = load_run(Path(config.run_dir)).params["heads"]["classify"]
        expected = base.params["heads"]["classify"]
        order = [labels.index(label) for label in (task.get("labels") or labels)]
        np.testing.assert_array_equal(head["w"], expected["w"][np.array(order)])
    other = make_config(folder, "all-tags", ".conll", task={"kind": "tag"}, init_from=trained("all").run_dir)
    assert trainer.train(replace(other, train={"num_steps": 1})) == 0
    assert "head        tag: new, 2 labels" in capsys.readouterr().out


def test_a_tokenizer_beside_that_of_the_base_is_refused(folder):
    config = make_config(folder, "all-tokenizer")
    config = dataclasses.replace(config, tokenizer=TokenizerConfig(kind="bpe", vocab_size=300))
    with pytest.raises(UserError, match=r"tokenizer.kind='bpe' has no effect with init_from=.* \(bytes\) is used"):
        trainer.train(config)


@pytest.mark.slow
def test_the_best_checkpoint_is_chosen_by_the_score_that_is_asked_for(folder, monkeypatch, capsys):
    def scripted(scores):
        found = iter(LabelScores(*values) for values in scores)
        monkeypatch.setattr("gptjax.tasks.head_task.with_metric", lambda *_: next(found))

    found = [(0.5, 0.6, 0.9), (0.4, 0.7, 0.8), (0.3, 0.7, 0.7), (0.2, 0.1, 0.1)]  # loss, accuracy, macro F1
    for by, best in (("loss", 4), ("accuracy", 3), ("macro_f1", 1)):
        scripted(found)
        config = make_config(folder, f"all-by-{by}", train={"best_by": by, "eval_every": 1, "keep_checkpoints": 1})
        assert trainer.train(config) == 0
        assert load_run(Path(config.run_dir)).step == best
        assert f"step {best} · validation {LabelScores(*found[best - 1])} (best)" in capsys.readouterr().out
        kept = {int(path.name) for path in (Path(config.run_dir) / "checkpoints").iterdir()}
        assert kept == {best, 4}
    with pytest.raises(UserError, match=r"train\.best_by=.span_f1. needs tags of the form B-x"):
        task = {"kind": "tag", "tags_field": "tokens"}
        trainer.train(make_config(folder, "all-spans", ".conll", task=task, train={"best_by": "span_f1"}))


def test_the_language_model_under_a_head_is_still_the_base(folder, trained, capsys):
    lines = []
    for args in (["--run_dir", str(folder / "base")], ["--run_dir", trained("head").run_dir, "--language_model"]):
        assert main(["evaluate", *args]) == 0
        lines.append(capsys.readouterr().out.splitlines()[-1])
    assert lines[0] == lines[1] and lines[0].startswith("loss ")


@pytest.mark.slow
def test_words_are_tagged(folder, capsys):
    config = make_config(folder, "all-tag", ".conll", task={"kind": "tag", "lookahead": 1}, train={"num_steps": 60})
    assert trainer.train(config) == 0
    last = read_metrics(Path(config.run_dir))[-1]
    assert last["accuracy"] > 0.9 and last["span_f1"] > 0.8
    capsys.readouterr()
    assert main(["predict", "--run_dir", config.run_dir, "--text", "aaa bbb", "bbb"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["tokens"] for row in rows] == [["aaa", "bbb"], ["bbb"]]
    assert [len(row["predicted"]) for row in rows] == [2, 1] == [len(row["probabilities"]) for row in rows]
    assert main(["evaluate", "--run_dir", config.run_dir]) == 0
    assert f"span F1 {last['span_f1']:.4f}" in capsys.readouterr().out


def test_instructions_are_learned_and_measured(folder, capsys):
    task = {"kind": "instruct", "max_tokens": 32}
    with pytest.raises(UserError, match=r"task.max_tokens=32: none of 40 chats has a response"):
        trainer.train(make_config(folder, "lora-long", "-chat.jsonl", task=task))
    config = make_config(folder, "lora-chat", "-chat.jsonl", task=task | {"template": "{role}{content}"})
    assert trainer.train(config) == 0
    assert "left out because no response begins before that" in capsys.readouterr().out
    best = min(row["val_loss"] for row in read_metrics(Path(config.run_dir)) if "val_loss" in row)
    assert main(["evaluate", "--run_dir", config.run_dir]) == 0
    assert capsys.readouterr().out.startswith(f"loss {best:.4f}")
    options = ["--run_dir", config.run_dir, "--max_new_tokens", "3", "--temperature", "0"]
    assert main(["sample", *options, "--prompt", "--- a"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("user--- aassistant")
    as_it_is = ["sample", *options, "--raw", "--allow_special"]
    assert main([*as_it_is, "--prompt", "<|endoftext|>user--- aassistant"]) == 0
    assert capsys.readouterr().out == f"<|endoftext|>{written}", (
        "the template and the start token are those of training"
    )
    assert main(["sample", "--run_dir", str(folder / "base"), "--prompt", "a", "--raw"]) == 2
    assert "raw=True has no effect" in capsys.readouterr().err


def test_texts_with_several_labels(folder, tmp_path, capsys):
    for name in ("train", "validation"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) | {"label": ["a", "b", "c"][: n % 4]} for n, line in enumerate(lines)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(folder, "all-several", task={"validation_path": (str(tmp_path / "validation.jsonl"),)})
    config = replace(config, data={"path": (str(tmp_path / "train.jsonl"),)}, train={"eval_every": 0})
    assert trainer.train(config) == 0
    assert load_config(Path(config.run_dir) / "config.yaml").task.multi_label
    capsys.readouterr()
    assert main(["predict", "--run_dir", config.run_dir, "--text", "aaa"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["predicted"], list)
    assert main(["evaluate", "--run_dir", config.run_dir]) == 0


def test_from_scratch_the_task_has_a_tokenizer_of_its_own(folder):
    config = make_config(folder, "all-scratch", init_from="", train={"num_steps": 1})
    config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, kind="bpe", vocab_size=280))
    assert trainer.train(config) == 0
    run = load_run(Path(config.run_dir))
    assert run.tokenizer is not None and run.config.model.vocab_size == run.tokenizer.vocab_size <= 280


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"finetune": {"train": "new"}, "task": {"kind": "pretrain", "validation_path": ()}},
            "nothing would be trained",
        ),
        ({"finetune": {"train": "all"}}, "would train the model under its lora adapter"),
        ({"init_from": ""}, "would freeze parameters that were drawn at random"),
        ({"finetune": {"top_k": 3}}, "finetune.top_k=3 has no effect without finetune.train=top"),
        ({"finetune": {"train": "paths"}}, "finetune.paths is empty"),
        ({"finetune": {"train": "paths", "paths": ("(",)}}, "finetune.paths: '\\(' is no regular expression"),
        ({"data": {"min_characters": 9}}, "data.min_characters=9 has no effect without task.kind=pretrain"),
        ({"task": {"lookahead": 1}}, "task.lookahead=1 has no effect without task.kind=tag"),
        ({"task": {"template": "{role}"}}, "template"),
        ({"train": {"z_loss": 0.1}}, "train.z_loss=0.1 has no effect"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, change, message):
    if change.get("task", {}).get("kind") == "pretrain":
        change = change | {"model": {"adapter": AdapterConfig()}}
    with pytest.raises(UserError, match=message):
        replace(make_config(folder, "lora-wrong"), **change)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("top-wrong", {"finetune": {"top_k": 9}}, "finetune.top_k=9 must be at most model.n_layer=2"),
        ("paths-wrong", {"finetune": {"paths": ("nothing",)}}, "'nothing' matches no parameter"),
        ("head-wrong", {"task": {"max_tokens": 99}}, "task.max_tokens=99 must be at most model.block_size=32"),
    ],
)
def test_options_that_do_not_fit_the_base_are_refused(folder, name, change, message):
    with pytest.raises(UserError, match=message):
        trainer.train(replace(make_config(folder, name), **change))


def make_multi(folder: Path, parts: tuple[PartConfig, ...]) -> Config:
    config = make_config(folder, "all-multi")
    return dataclasses.replace(config, task=TaskConfig(kind="multi"), data=DataConfig(), parts=parts)


@pytest.mark.slow
def test_several_tasks_share_a_model(folder, capsys):
    kinds = {"letter": ("classify", ".jsonl"), "spans": ("tag", ".conll"), "chat": ("instruct", "-chat.jsonl")}
    parts = [
        PartConfig(
            name=name,
            weight=weight,
            task=TaskConfig(
                kind=kind,
                validation_path=(str(folder / f"validation{ending}"),),
                **({"template": "{role}{content}"} if kind == "instruct" else {}),
            ),
            data=DataConfig(path=(str(folder / f"train{ending}"),)),
        )
        for (name, (kind, ending)), weight in zip(kinds.items(), (1.0, 0.5, 2.0), strict=True)
    ]
    text = PartConfig(name="text", weight=4.0, data=run_config(folder).data)
    again = dataclasses.replace(parts[0], name="again", weight=3.0, head="letter")
    config = make_multi(folder, (*parts, text, again))
    assert trainer.train(replace(config, train={"num_steps": 2})) == 0
    assert trainer.train(config) == 0
    saved = load_config(Path(config.run_dir) / "config.yaml")
    assert [part.task.labels for part in saved.parts] == [("a", "b"), ("B-X", "O"), (), (), ("a", "b")]
    params = load_run(Path(config.run_dir), "latest").params
    assert {name: head["w"].shape[0] for name, head in params["heads"].items()} == {"letter": 2, "spans": 2}
    last = read_metrics(Path(config.run_dir))[-1]
    weights = {"letter": 1.0, "spans": 0.5, "chat": 2.0, "text": 4.0, "again": 3.0}
    expected = sum(weight * last[f"{name}/val_loss"] for name, weight in weights.items()) / 10.5
    assert last["again/val_loss"] == last["letter/val_loss"], "the same rows and the same head"
    assert last["val_loss"] == pytest.approx(expected)
    capsys.readouterr()
    run = ["--run_dir", config.run_dir, "--checkpoint", "latest"]
    assert main(["predict", *run, "--part", "spans", "--text", "aaa bbb"]) == 0
    assert len(json.loads(capsys.readouterr().out)["predicted"]) == 2
    assert main(["evaluate", *run, "--part", "again"]) == 0
    assert f"loss {last['letter/val_loss']:.4f}" in capsys.readouterr().out
    assert main(["evaluate", *run, "--part", "text", "--windows", "512"]) == 0
    written = capsys.readouterr()
    assert written.out.startswith(f"loss {last['text/val_loss']:.4f} ") and "has changed" not in written.err
    assert main(["evaluate", *run]) == 2
    assert "part='' must be one of letter, spans, chat, text, again" in capsys.readouterr().err


@pytest.mark.slow
def test_the_loss_of_several_tasks_is_the_weighted_sum_of_their_means(folder):
    sentences = [Words(("ab", "c"), ("x", "y"), ""), Words(("a",), ("y",), "")]
    texts = [Text("abc", ("x",), ""), Text("b", ("y",), ""), Text("cc", ("y",), "")]
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes"), lambda: [])
    words = encode_words(sentences, tokenizer, ("x", "y"), 16, 0)
    windows = {
        "t": TextBatches(encode_texts(texts, tokenizer, ("x", "y"), False, 16), TaskConfig(kind="classify"), 0),
        "w": PackedSequences(words.sequences, 16, 0),
    }
    weights = {"t": 1.0, "w": 3.0}
    labels = {"labels": ("x", "y")}
    parts = (
        PartConfig(name="t", weight=1.0, task=TaskConfig(kind="classify", **labels)),
        PartConfig(name="w", weight=3.0, task=TaskConfig(kind="tag", **labels)),
    )
    config = replace(make_multi(folder, parts), model={"vocab_size": 257})
    state = init_state(config)
    batch = MultiBatches(windows, weights).batch(0, 4)
    losses, loss = {}, jax.jit(make_loss(config, Compute(unroll=1)))
    for name, part in parts_of(config).items():
        # Of all, one is looked at by taking the others' share away.
        only = batch._replace(shares={n: s * (n == name) for n, s in batch.shares.items()})
        losses[name] = float(loss(state.params, only, None).objective)
        alone = jax.jit(make_part_loss(part, name, Compute(unroll=1)))(state.params, batch.parts[name], None)
        assert losses[name] == pytest.approx(weights[name] * float(alone.objective / alone.count), rel=1e-5)
    cut = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    whole = jax.tree.map(lambda x: x[None], batch)
    step = jax.jit(make_train_step(config))
    (_, one), (_, two) = step(state, whole), step(state, cut)
    assert float(one["loss"]) == pytest.approx(sum(losses.values()), rel=1e-5)
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)
    assert float(two["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-4)
