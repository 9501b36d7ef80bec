"""gptjax from Python: what it returns is what the parts compute."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.checkpoints.run_dir import write_run
from gptjax.config.verbs.exchange import ExportConfig
from gptjax.errors import UserError
from gptjax.exchange.runs import export_run
from gptjax.model import gpt
from tests.test_architectures import config_of, params_of
from tests.tiny import hidden_states, replace, run_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("api"), model={"block_size": 64})
    return gptjax.train(config)


def test_importing_the_package_starts_nothing():
    code = (
        "import sys, gptjax; print(sorted({'jax', 'flax', 'numpy', 'datasets'} & set(sys.modules)), gptjax.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[]")
    with pytest.raises(AttributeError, match="it has Config, Model, load, train"):
        gptjax.lode  # noqa: B018


def test_training_returns_the_model_of_the_run_and_loading_gives_the_same(trained):
    again = gptjax.load(trained.config.run_dir)
    np.testing.assert_array_equal(trained.logits("abc 1"), again.logits("abc 1"))
    assert trained.run.step == again.run.step == 6


def test_logits_are_those_of_the_model_whatever_the_padding(trained):
    text = "aaa 1\nbbb 2"
    ids = trained.tokens(text)
    assert ids[0] == trained.tokenizer.end_of_text
    x_BTD = hidden_states(trained.config.model, trained.params, jnp.asarray(ids)[None], jnp.arange(len(ids))[None])
    expected = gpt.logits(trained.config.model, trained.params, x_BTD)[0]
    np.testing.assert_allclose(trained.logits(text), expected, atol=1e-5)  # float32 sums in another order
    np.testing.assert_array_equal(trained.logits(ids), trained.logits(text))
    first, second = trained.logits([text, "c"])
    np.testing.assert_array_equal(first, trained.logits(text))
    assert second.shape == (2, trained.config.model.vocab_size)


def test_loss_and_embeddings(trained):
    text = "aaa 1\nbbb 2"
    ids, logits = trained.tokens(text), np.asarray(trained.logits(text), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean([log_p[t, ids[t + 1]] for t in range(len(ids) - 1)])
    assert trained.loss(text) == pytest.approx(expected, rel=1e-6)
    assert trained.loss([text, text]) == [trained.loss(text)] * 2
    unit = trained.embed(["abc", "abd"], normalized=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-6)
    assert (trained.embed("abc", "last") != trained.embed("abc", "mean")).any()


def test_generating_takes_the_options_of_sample(trained):
    [[first], [second]] = trained.generate(["aaa", "bbb"], max_new_tokens=5, temperature=0.0)
    assert [[first]] == trained.generate("aaa", max_new_tokens=5, temperature=0.0) and second
    with pytest.raises(UserError, match=r"temprature.*Did you mean 'temperature'"):
        trained.generate("aaa", temprature=0.0)


def test_what_does_not_fit_is_refused(trained):
    with pytest.raises(UserError, match=r"a text has 101 tokens, must have 1 to model.block_size=64"):
        trained.logits("a" * 100)
    with pytest.raises(UserError, match=r"outside of model.vocab_size"):
        trained.logits([9999])
    with pytest.raises(UserError, match="predict needs a task with a head"):
        trained.predict("abc")


def test_a_config_can_be_nested_values(tmp_path):
    config = run_config(tmp_path)
    values = {
        "run_dir": config.run_dir, "cache_dir": config.cache_dir, "data": {"path": list(config.data.path)},
        "tokenizer": {"kind": "bytes"}, "train": {"num_steps": 1, "sample_tokens": 0, "batch_size": 4},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32}, "optim": {"warmup_steps": 2},
    }  # fmt: skip
    model = gptjax.train(values, train={"num_steps": 2})
    assert model.run.step == 2 and model.config.train.batch_size == 4


def test_a_classifier_predicts(tmp_path):
    rows = [f'{{"text": "{word} {n}", "label": "{label}"}}' for n in range(40)
            for word, label in (("good fine", "yes"), ("bad poor", "no"))]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = run_config(
        tmp_path, data={"path": (str(tmp_path / "rows.jsonl"),)}, task={"kind": "classify"},
        train={"num_steps": 30, "eval_every": 0, "eval_windows": 512, "save_every": 0}, optim={"learning_rate": 1e-2},
    )  # fmt: skip
    found = gptjax.train(config).predict(["good fine 3", "bad poor 4"])
    assert [row["predicted"] for row in found] == ["yes", "no"]
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)


def test_a_hugging_face_folder_loads(tmp_path, trained):
    config = config_of("gpt2")
    write_run(tmp_path / "run", replace(trained.config, model=vars(config)), params_of(config), None)
    export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "hf")))
    model = gptjax.load(tmp_path / "hf")
    np.testing.assert_allclose(model.logits([1, 2, 3]), gptjax.load(tmp_path / "run").logits([1, 2, 3]), atol=1e-5)
    with pytest.raises(UserError, match="no tokenizer"):
        model.logits("abc")
