"""The model class for EleutherAI's lm-evaluation-harness, against NumPy and against the harness's own backend."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.verbs.exchange import ExportConfig
from gptjax.errors import UserError
from gptjax.exchange import harness
from gptjax.exchange.runs import export_run
from gptjax.model.gpt import logits
from tests.tiny import hidden_states, untrained_run

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of other programs
PAIRS = [
    ("aaa 1\nbbb 2\n", "ccc 3"),
    ("", "hhh 1"),
    ("x " * 60, "aaa"),
    ("ends in a space ", "bbb 4\nccc"),
    *((f"{'abcdefgh'[n] * 3}", f" {n}\n") for n in range(5)),
]
# The long text does not repeat itself: the harness's own backend mixes up windows that are equal.
TEXTS = ["aaa 1\nbbb 2\n", "".join(f"{'abcdefgh'[n % 8] * 3} {n % 7}\n" for n in range(30)), "z"]


@dataclasses.dataclass
class Request:
    """What the model reads of an `lm_eval.api.instance.Instance`."""

    args: tuple


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a BPE, which transformers can read."""
    return untrained_run(tmp_path_factory.mktemp("harness"), tokenizer={"kind": "bpe", "vocab_size": 300})


@pytest.fixture(scope="module")
def model(run):
    """The run as a model of the harness."""
    return harness.model_class()(run_dir=run.run_dir, batch_size=4)


def table(run, ids) -> np.ndarray:
    """Log-probabilities of all next tokens, float64 `[T, V]`."""
    loaded = load_run(Path(run.run_dir))
    tokens = jnp.asarray(ids, jnp.int32)[None]
    states = hidden_states(loaded.config.model, loaded.params, tokens, jnp.arange(len(ids))[None])
    scores = np.asarray(logits(loaded.config.model, loaded.params, states)[0], np.float64)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_requests_are_answered_as_numpy_does(run, model):
    tokenizer, T = load_run(Path(run.run_dir)).tokenizer, run.model.block_size
    assert tokenizer is not None and tokenizer.end_of_text is not None
    found = model.loglikelihood([Request(pair) for pair in PAIRS[:2]])
    for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=False):
        before = tokenizer.encode(context.rstrip()).tolist() or [tokenizer.end_of_text]
        whole = [*before, *tokenizer.encode(context + continuation)[len(tokenizer.encode(context.rstrip())) :].tolist()]
        n = len(whole) - len(before)
        expected = table(run, whole[:-1])[-n:]
        assert score == pytest.approx(expected[np.arange(n), whole[-n:]].sum(), abs=1e-3)
        assert greedy == bool((expected.argmax(-1) == whole[-n:]).all())
    [rolling] = model.loglikelihood_rolling([Request((TEXTS[0],))])
    ids = [tokenizer.end_of_text, *tokenizer.encode(TEXTS[0]).tolist()]
    assert len(ids) <= T
    assert rolling == pytest.approx(table(run, ids[:-1])[np.arange(len(ids) - 1), ids[1:]].sum(), abs=1e-3)
    ids = tokenizer.encode("aaa 1\nbbb").tolist()
    for _ in range(6):
        ids.append(int(table(run, ids)[-1].argmax()))
    text = tokenizer.decode(ids[-6:])
    asked = {"until": [text[3]], "max_gen_toks": 6}
    answers = model.generate_until([Request(("aaa 1\nbbb", asked)), Request(("aaa 1\nbbb", {"max_gen_toks": 6}))])
    assert answers == [text[: text.index(text[3])], text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' must be float32 or bfloat16"),
        ({"checkpoint": "3"}, "checkpoint='3' must be best or latest"),
        ({"pretrained": "x"}, "unknown pretrained; known: run_dir"),
        ({"batch_size": "auto"}, "batch_size='auto' must be a whole number"),
    ],
)
def test_wrong_arguments_are_refused(run, arguments, message):
    with pytest.raises(UserError, match=message):
        harness.model_class()(run_dir=run.run_dir, **arguments)


def test_answers_that_leave_no_room_for_a_context_are_refused(run, model):
    with pytest.raises(UserError, match=r"max_gen_toks=256 must be less than model\.block_size=32"):
        model.generate_until([Request(("a", {"until": ["\n"]}))])


@pytest.mark.slow  # imports PyTorch
def test_a_local_task_scores_as_with_the_backend_for_transformers(run, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="needs the extra parity")
    pytest.importorskip("transformers", reason="needs the extra parity")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    harness.register()
    export_run(Path(run.run_dir), ExportConfig(to=str(tmp_path / "hf")))
    rows = [{"q": f"{'abcdefgh'[n % 8] * 3} {n % 7}\n", "options": ["bbb 1", "ccc", "aaa 5 "], "gold": n % 3,
             "text": TEXTS[n % 3]} for n in range(12)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    kinds = {
        "choice": {"output_type": "multiple_choice", "doc_to_choice": "{{options}}", "doc_to_target": "gold",
                   "num_fewshot": 0},
        "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                    "metric_list": [{"metric": "bits_per_byte"}]},
        "generate": {"output_type": "generate_until", "doc_to_target": "{{q}}",
                     "generation_kwargs": {"until": ["zzz"], "max_gen_toks": 6},
                     "metric_list": [{"metric": "exact_match"}]},
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    for name, task in kinds.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": f"gptjax_{name}", **common, **task}))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)

    def evaluate(model: str, arguments: str) -> dict:
        return lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=[f"gptjax_{name}" for name in kinds], task_manager=manager,
            device="cpu", batch_size=4, bootstrap_iters=0,
        )  # fmt: skip

    ours = evaluate("gptjax", f"run_dir={run.run_dir}")
    theirs = evaluate("hf", f"pretrained={tmp_path / 'hf'},dtype=float32")
    for name in kinds:
        for mine, other in zip(ours["samples"][f"gptjax_{name}"], theirs["samples"][f"gptjax_{name}"], strict=True):
            if name == "generate":
                assert mine["resps"] == other["resps"]
            else:
                np.testing.assert_allclose(
                    np.array(mine["resps"], float).ravel(), np.array(other["resps"], float).ravel(), atol=1e-3
                )
        for metric, value in theirs["results"][f"gptjax_{name}"].items():
            if isinstance(value, float):
                assert ours["results"][f"gptjax_{name}"][metric] == pytest.approx(value, abs=1e-3), metric
