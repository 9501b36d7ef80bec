"""What helps with few rows: folds, synonyms, and a learning rate taken from the base."""

import json

import jax
import numpy as np
import pytest

from gptjax.batches.labelled import TextBatches
from gptjax.config.data import DataConfig
from gptjax.config.optim import OptimConfig
from gptjax.config.run import Config
from gptjax.config.task import FinetuneConfig, TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.tasks.registry import read_examples
from gptjax.tasks.texts import encode_examples, make_rewrite
from gptjax.tasks.trainable import START, forward_params, join, mixed_with_start
from gptjax.text.labelled import Text
from gptjax.text.replace import read_synonyms, replace_words
from gptjax.text.tokenizer import make_tokenizer
from gptjax.training.resolve import with_base_rate
from tests.tiny import MODEL, replace

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), lambda: [])


def test_every_row_is_validated_in_one_fold(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}", "label": "ab"[n % 2]}) + "\n" for n in range(60)))
    seen = []
    for fold in range(3):
        found = read_examples(TaskConfig(kind="classify", folds=3, fold=fold), DataConfig(path=(str(path),)))
        assert len(found.train) + len(found.validation) == 60 and len(found.validation) > 10
        seen += [example.text for example in found.validation]
    assert sorted(seen) == sorted(f"t{n}" for n in range(60))
    with pytest.raises(UserError, match=r"task.fold=3 must be below task.folds=3"):
        TaskConfig(kind="classify", folds=3, fold=3)


def test_mixout_replaces_a_share_of_the_weights_and_keeps_their_expectation():
    config = replace(Config(init_from="base"), finetune={"mixout": 0.3})
    random = np.random.default_rng(0)
    weights, start = random.normal(2, 1, (2, 300, 300)).astype(np.float32)
    learning, frozen = {"w": weights, "heads": {"x": weights[0]}}, {START: {"w": start}}
    found = mixed_with_start(config, learning, frozen, jax.random.key(1))
    np.testing.assert_array_equal(found["heads"]["x"], weights[0])
    replaced = np.isclose(found["w"], start, atol=1e-5)
    assert replaced.mean() == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(found["w"][~replaced], ((weights - 0.3 * start) / 0.7)[~replaced], rtol=1e-4)
    assert np.mean(np.asarray(found["w"]) - weights) == pytest.approx(0.0, abs=0.02)
    again = mixed_with_start(config, learning, frozen, jax.random.key(2))
    assert not np.array_equal(again["w"], found["w"])
    assert forward_params(learning, frozen).keys() == join(learning, frozen).keys() == {"w", "heads"}


def test_synonyms_replace_words_of_training_texts(tmp_path):
    path = tmp_path / "synonyms.tsv"
    path.write_text("big\tlarge\thuge\nquick\tfast\n")
    words = read_synonyms(str(path))
    assert words["big"] == ("large", "huge") and words["fast"] == ("quick",)
    assert replace_words("Quick, bigger fox", words, 0.999, np.random.default_rng(0)) == "Fast, bigger fox"
    texts = [Text(f"big dog {n} big", ("x",), "") for n in range(32)]
    batches = {}
    for share in (0.0, 0.5):
        task = TaskConfig(kind="classify", labels=("x",), augment_synonyms=share, synonyms=str(path) if share else "")
        config = replace(Config(model=MODEL, task=task), model={"vocab_size": 257, "block_size": 32})
        rows = encode_examples(config, BYTES, texts, np.zeros(32, np.int32))
        windows = TextBatches(rows, task, 0, make_rewrite(config, BYTES, texts))
        batches[share] = [
            bytes(ids[1 : n - 1].tolist()).decode() for ids, n in zip(*windows.batch(0, 4)[:2], strict=True)
        ]
        again = windows.batch(0, 4)
        np.testing.assert_array_equal(windows.batch(0, 4).inputs, again.inputs)
    assert batches[0.0] != batches[0.5]
    for before, after in zip(batches[0.0], batches[0.5], strict=True):
        [kept], [same] = ([w for w in text.split() if w.isdecimal()] for text in (before, after))
        assert kept == same and {*after.split()} <= {"big", "large", "huge", "dog", kept}


def test_wrong_synonyms_are_named(tmp_path):
    path = tmp_path / "synonyms.tsv"
    path.write_text("big\tlarge\nalone\n")
    with pytest.raises(UserError, match=r"synonyms.tsv:2: 'alone' has no synonym"):
        read_synonyms(str(path))
    with pytest.raises(UserError, match=r"task.synonyms='/nowhere' cannot be read"):
        read_synonyms("/nowhere")
    with pytest.raises(UserError, match=r"task.augment_synonyms=0.1 needs a file"):
        TaskConfig(kind="classify", augment_synonyms=0.1)


def test_the_rate_is_a_share_of_that_of_the_base(capsys):
    config = Config(init_from="b", finetune=FinetuneConfig(base_rate=0.1))
    found = with_base_rate(config, 2e-3)
    assert found.optim.learning_rate == pytest.approx(2e-4) and found.optim.min_learning_rate == pytest.approx(2e-5)
    assert "rate        0.0002 = finetune.base_rate 0.1 x 0.002 of b" in capsys.readouterr().out
    assert found.finetune.base_rate == 0.0, "a run that resumes has the rate itself"
    assert with_base_rate(found, 1.0) == found
    with pytest.raises(UserError, match=r"optim.learning_rate=0.5 and finetune.base_rate=0.1 both set the"):
        Config(init_from="b", finetune=FinetuneConfig(base_rate=0.1), optim=OptimConfig(learning_rate=0.5))
