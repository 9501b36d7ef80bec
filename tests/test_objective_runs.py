"""Whole runs of objectives other than the next token: what is measured, what they can do, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.batches.labelled import TextBatch
from gptjax.checkpoints.run_dir import load_run
from gptjax.config.data import DataConfig
from gptjax.config.mesh import MeshConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.evaluation.loss import Evaluation
from gptjax.generation.decode import stream
from gptjax.generation.request import Request
from gptjax.model import gpt
from gptjax.model.gpt import Compute
from gptjax.model.loss import label_logits
from gptjax.parallel.fits import check_fits
from gptjax.parallel.mesh import make_mesh
from gptjax.training import trainer
from gptjax.verbs.evaluate import evaluate_run
from tests.faults.inputs import refused
from tests.tiny import MODEL, hidden_states, init_params, replace, rows, run_config


def make_run(folder, kind, **sections):
    sections = {"task": {"objective": ObjectiveConfig(kind=kind)}, "run_dir": str(folder / kind)} | sections
    return run_config(folder, **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A masked run, and a prefix run with samples."""
    folder = tmp_path_factory.mktemp("objectives")
    masked = make_run(folder, "masked", model={"bidirectional": True}, train={"num_steps": 2, "sample_tokens": 4})
    spare = {"vocab_size": 300}  # ids for tokens that a later objective adds
    prefix = make_run(folder, "prefix", model=spare, train={"num_steps": 2, "sample_tokens": 4})
    for config in (masked, prefix):
        assert trainer.train(config) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "prefix"])
def test_evaluate_measures_what_the_run_measured(folder, kind):
    run_dir = folder / kind
    [row] = [row for row in rows(load_run(run_dir).config) if "val_loss" in row]
    assert "bits_per_byte" not in row
    found = evaluate_run(EvaluateConfig(run_dir=str(run_dir), windows=8, batch_size=8))
    assert found.splitlines()[0] == str(Evaluation(row["val_loss"], row["perplexity"], None)) and "bits" not in found


def test_a_prefix_run_continues_text_and_a_masked_run_says_why_not(folder, capsys):
    assert (folder / "prefix" / "samples.txt").read_text().count("--- step") == 1
    assert not (folder / "masked" / "samples.txt").exists()
    masked = gptjax.load(folder / "masked")
    with pytest.raises(UserError, match=r"cannot continue text: task.objective.kind=masked; it predicts tokens from"):
        masked.generate("aaa")
    with pytest.raises(UserError, match="cannot continue text"):
        masked.loss("aaa")
    for verb in (["inspect", str(folder / "masked"), "--text", "aaa"], ["diagnose", str(folder / "masked")]):
        assert "the probability of a text is needed here" in refused(capsys, *verb)
    rows = {"benchmark": "lambada", "data": DataConfig(path=("unread",))}
    with pytest.raises(UserError, match="the probability of a text is needed here, and it predicts tokens from both"):
        evaluate_run(EvaluateConfig(run_dir=str(folder / "masked"), **rows))
    with pytest.raises(UserError, match="it learned to read prefixes from both sides"):
        evaluate_run(EvaluateConfig(run_dir=str(folder / "prefix"), **rows))
    assert masked.logits("aaa 1 bbb").shape == (10, masked.config.model.vocab_size)


@pytest.mark.slow
def test_a_prompt_of_a_prefix_model_attends_to_itself_in_both_directions():
    params = jax.tree.map(lambda p: 8 * p, init_params(MODEL, jax.random.key(0)))
    prompts = [np.array([3, 9, 4, 1, 7]), np.array([5, 2])]
    options = SampleConfig(max_new_tokens=6, temperature=0.0, compute_dtype="float32")
    pieces = list(stream(MODEL, params, Request(prompts, options), prefix=True, piece_length=2))
    for prompt, parts in zip(prompts, zip(*pieces, strict=True), strict=True):
        new = np.concatenate([part.tokens_N for part in parts])
        tokens = prompt.tolist()
        for _ in range(6):
            ids, T = np.array([tokens + [0] * (11 - len(tokens))]), 11
            positions, ahead = np.arange(T)[None], np.arange(T)[None] < len(prompt)
            x_BTD = hidden_states(MODEL, params, ids, positions, ahead_BT=jnp.asarray(ahead))
            tokens.append(int(gpt.logits(MODEL, params, x_BTD)[0, len(tokens) - 1].argmax()))
        assert new.tolist() == tokens[len(prompt) :]


@pytest.mark.slow
def test_labels_are_learned_over_a_masked_model(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"aaa {n}", "label": "ab"[n % 2]}) + "\n" for n in range(40)))
    config = dataclasses.replace(
        run_config(tmp_path, train={"num_steps": 1, "eval_windows": 512, "eval_every": 0}),
        run_dir=str(tmp_path / "labels"),
        init_from=str(folder / "masked"),
        task=TaskConfig(kind="classify"),
        data=DataConfig(path=(str(data),)),
    )
    assert trainer.train(config) == 0
    run = load_run(tmp_path / "labels")
    assert run.config.model.bidirectional
    texts = np.array([[97, 98, 99, 32, 97], [97, 98, 33, 34, 35]], np.int32)
    batch = TextBatch(texts, np.array([5, 2], np.int32), np.zeros(2, np.int32), np.ones(2, np.float32))
    alone = TextBatch(texts[1:, :2], batch.lengths[1:], batch.targets[1:], batch.weights[1:])

    def logits(batch):
        of_batch = jax.jit(label_logits, static_argnums=(0, 1, 2, 4))
        return np.asarray(of_batch(run.config.model, run.config.task, Compute(unroll=1), run.params, "classify", batch))

    np.testing.assert_allclose(logits(batch)[1], logits(alone)[0], atol=1e-6)  # padding is not attended to
    later = batch._replace(inputs=np.where(np.arange(5) == 4, 98, texts).astype(np.int32))
    assert np.abs(logits(later)[0] - logits(batch)[0]).max() > 0
    instruct = dataclasses.replace(config, task=TaskConfig(kind="instruct"), run_dir=str(tmp_path / "instruct"))
    data.write_text("".join(json.dumps({"prompt": f"p{n}", "response": "r"}) + "\n" for n in range(9)))
    with pytest.raises(UserError, match=r"model.bidirectional=true: task.kind=instruct.* would see its targets"):
        trainer.train(instruct)


@pytest.mark.slow
def test_heads_for_tokens_ahead_are_trained_saved_and_not_needed(tmp_path):
    objective = ObjectiveConfig(kind="multi_token", ahead=3)
    config = make_run(tmp_path, "multi_token", task={"objective": objective}, train={"num_steps": 2, "remat": "full"})
    assert trainer.train(config) == 0
    found = rows(config)
    assert {"loss_2_ahead", "loss_3_ahead"} <= set(found[0])
    params = load_run(tmp_path / "multi_token").params
    assert jax.tree.leaves(params["heads"]["ahead"])[0].shape[0] == 2
    [row] = [row for row in found if "val_loss" in row]
    plain = str(Evaluation(row["val_loss"], row["perplexity"], row["bits_per_byte"]))
    assert evaluate_run(EvaluateConfig(run_dir=config.run_dir, windows=8, batch_size=8)).splitlines()[0] == plain
    assert len(gptjax.load(config.run_dir).generate("aaa", max_new_tokens=2)) == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"objective": ObjectiveConfig(kind="masked")}}, "needs model.bidirectional=true"),
        ({"model": {"bidirectional": True}}, r"task.objective.kind=causal would see its targets"),
        (
            {"task": {"objective": ObjectiveConfig(kind="permutation")}, "model": {"positions": "alibi"}},
            "permutation shuffles tokens",
        ),
        (
            {"task": {"objective": ObjectiveConfig(kind="permutation")}, "model": {"attention_window": 4}},
            "attention_window=4 has no effect",
        ),
        (
            {"task": {"objective": ObjectiveConfig(kind="backward")}, "train": {"sample_prompt": "a"}},
            "train.sample_prompt='a' has no effect without a model that continues text",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections, message):
    with pytest.raises(UserError, match=message):
        replace(Config(), **sections)


def test_a_masked_run_cannot_start_from_a_causal_one_and_heads_have_no_stage(folder, tmp_path):
    config = make_run(tmp_path, "masked", init_from=str(folder / "prefix"))
    with pytest.raises(UserError, match=r"was trained with model.bidirectional=false"):
        trainer.train(config)
    config = make_run(tmp_path, "multi_token")
    with pytest.raises(UserError, match=r"does not go with task.objective.kind=multi_token"):
        check_fits(config, make_mesh(MeshConfig(data=2, stage=2)))
