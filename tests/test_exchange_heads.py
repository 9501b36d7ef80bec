"""Heads of labels and LoRA adapters of transformers and peft, in and out."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.labelled import TextBatch
from gptjax.checkpoints.run_dir import load_run, write_run
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.task import LORA_TARGETS, AdapterConfig, FinetuneConfig, TaskConfig
from gptjax.config.verbs.exchange import ExportConfig
from gptjax.errors import UserError
from gptjax.exchange.peft import export_lora, import_lora
from gptjax.exchange.runs import export_run, import_run
from gptjax.model.gpt import Compute, hidden_states, logits
from gptjax.model.heads import head_logits
from gptjax.model.loss import label_logits
from gptjax.text.tokenizers.base import END_OF_TEXT
from gptjax.text.tokenizers.byte_pair import bpe_tokenizer_from_ranks
from gptjax.text.train_bpe import PATTERN, train_ranks
from tests.test_model_parity import make_params
from tests.tiny import assert_trees_close

torch = pytest.importorskip("torch", reason="needs the extra gptjax[parity]")
transformers = pytest.importorskip("transformers", reason="needs the extra gptjax[parity]")

GPT2 = ModelConfig(n_layer=2, n_head=4, n_embd=24, block_size=40, vocab_size=61)
LLAMA = dataclasses.replace(
    GPT2,
    **{"n_kv_head": 2, "mlp_width": 40, "norm": "rms", "activation": "silu", "gated": True, "bias": False},
    positions="rope",
)
NEOX = dataclasses.replace(GPT2, positions="rope", tied_embeddings=False)
MODELS = {"gpt2": GPT2, "llama": LLAMA, "gpt_neox": NEOX, "phi3": LLAMA}
TOKENS = np.random.default_rng(0).integers(0, 61, (1, 20))
RNG = np.random.default_rng(1)
uses_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it


@functools.partial(jax.jit, static_argnums=0)
def states(model, params):
    positions_BT = jnp.arange(TOKENS.shape[1])[None]
    return hidden_states(model, params, TOKENS, positions_BT, compute=Compute(unroll=1))


def our_logits(model, params):
    return np.asarray(logits(model, params, states(model, params)))


def their_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def write_labels(run_dir, model, task, bias=True):
    """A run with a head of labels, whose bias is not small."""
    count = len(task.labels)
    head = {"w": jnp.asarray(RNG.standard_normal((count, model.n_embd)).astype(np.float32))}
    head["bias"] = jnp.asarray(RNG.standard_normal(count).astype(np.float32) * bias)
    params = make_params(model) | {"heads": {task.kind: head}}
    write_run(run_dir, Config(run_dir=str(run_dir), model=model, task=task), params, None)
    return params


CLASSIFY = TaskConfig(kind="classify", labels=("good", "bad", "ugly"), pooling="last")
TAG = TaskConfig(kind="tag", labels=("O", "B-X", "I-X", "B-Y"))


@pytest.mark.parametrize(
    ("name", "task", "bias"),
    [
        ("gpt2", CLASSIFY, True),
        ("gpt2", TAG, True),
        ("gpt_neox", CLASSIFY, True),
        ("gpt_neox", TAG, True),
        ("llama", dataclasses.replace(CLASSIFY, multi_label=True), False),
        ("llama", TAG, True),
    ],
)
def test_heads_give_the_logits_of_transformers_in_and_out(name, task, bias, tmp_path):
    model = MODELS[name]
    params = write_labels(tmp_path / "run", model, task, bias)
    export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "hf"), head=True, family=name))
    auto = {
        "classify": transformers.AutoModelForSequenceClassification,
        "tag": transformers.AutoModelForTokenClassification,
    }[task.kind]
    theirs, report = auto.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.id2label == dict(enumerate(task.labels))
    expected = their_logits(theirs)
    ours = np.asarray(head_logits(params["heads"][task.kind], states(model, params)))
    ours = ours[:, -1] if task.kind == "classify" else ours
    assert expected.std() > 0.3
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    theirs.save_pretrained(tmp_path / "saved")
    config = import_run(tmp_path / "saved", tmp_path / "again")
    again = load_run(tmp_path / "again")
    assert config.task == again.config.task == task
    batch = TextBatch(TOKENS, np.array([20]), np.array([-1]), np.ones(1, np.float32))
    if task.kind == "classify":
        ours = label_logits(again.config.model, task, Compute(unroll=1), again.params, "classify", batch)
    else:
        ours = head_logits(again.params["heads"]["tag"], states(again.config.model, again.params))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_tokenizer_of_a_classifier_adds_what_gptjax_adds(tmp_path):
    ranks = train_ranks(["the cat sat on the mat and the dog sat on the log; " * 20], 290, lambda message: None)
    tokenizer = bpe_tokenizer_from_ranks(ranks, PATTERN, {END_OF_TEXT: len(ranks), "<|pad|>": len(ranks) + 1})
    model = dataclasses.replace(GPT2, vocab_size=tokenizer.vocab_size)
    head = {"w": jnp.zeros((3, 24)), "bias": jnp.zeros(3)}
    config = Config(run_dir=str(tmp_path), model=model, task=CLASSIFY)
    write_run(tmp_path / "run", config, make_params(model) | {"heads": {"classify": head}}, tokenizer)
    export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "hf"), head=True))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    end = tokenizer.end_of_text
    expected = [end, *tokenizer.encode("the cat"), end]
    batch = theirs(["the cat", "the cat sat on the log"], padding=True)["input_ids"]
    assert batch[0][: len(expected)] == expected
    assert set(batch[0][len(expected) :]) == {len(ranks) + 1}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["pad_token_id"] == len(ranks) + 1


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("llama", CLASSIFY, "the head has a bias .*, for which a llama with ForSequenceClassification has no place"),
        ("gpt2", dataclasses.replace(CLASSIFY, pooling="mean"), "train with task.pooling=last"),
        ("gpt2", dataclasses.replace(TAG, lookahead=1), "train with task.lookahead=0"),
    ],
)
def test_a_head_that_their_classes_cannot_hold_is_an_error(name, task, message, tmp_path):
    write_labels(tmp_path / "run", MODELS[name], task)
    with pytest.raises(UserError, match=message):
        export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "hf"), head=True, family=name))
    assert not (tmp_path / "hf").exists()


def test_a_run_without_a_head_and_a_family_without_a_class_are_errors(tmp_path):
    write_run(tmp_path / "run", Config(model=GPT2), make_params(GPT2), None)
    with pytest.raises(UserError, match=r"has task.kind=pretrain and no single head"):
        export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "hf"), head=True))
    write_labels(tmp_path / "labels", LLAMA, TAG)
    with pytest.raises(UserError, match="family=granite has no class of transformers for a head"):
        export_run(tmp_path / "labels", ExportConfig(to=str(tmp_path / "hf"), head=True, family="granite"))
    with pytest.raises(UserError, match="adapter=True has no effect without"):
        ExportConfig(to="x", adapter=True, merge=True)


# --- LoRA ---------------------------------------------------------------------------------------------------------


def with_lora(model, targets=LORA_TARGETS):
    """A model with an adapter that changes much, and its parameters."""
    adapted = dataclasses.replace(model, adapter=AdapterConfig(kind="lora", rank=3, alpha=5.0, targets=targets))
    shapes = jax.eval_shape(lambda: make_params(adapted))["adapters"]
    adapters = jax.tree.map(lambda x: jnp.asarray(0.3 * RNG.standard_normal(x.shape).astype(np.float32)), shapes)
    return adapted, make_params(model) | {"adapters": adapters}


@uses_peft
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_adapter_gives_the_logits_of_peft(name, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra gptjax[parity]")
    model, params = with_lora(MODELS[name])
    write_run(tmp_path / "base", Config(model=MODELS[name]), make_params(MODELS[name]), None)
    config = Config(model=model, init_from=str(tmp_path / "base"), finetune=FinetuneConfig(train="new"))
    write_run(tmp_path / "run", config, {"adapters": params["adapters"]}, None, load_run(tmp_path / "base"))
    export_run(tmp_path / "run", ExportConfig(to=str(tmp_path / "peft"), adapter=True, family=name))
    export_run(tmp_path / "base", ExportConfig(to=str(tmp_path / "hf"), family=name))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    plain = their_logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    expected = their_logits(theirs)
    assert np.abs(expected - plain).max() > 0.1, "the adapter changes nothing"
    np.testing.assert_allclose(our_logits(model, params), expected, atol=1e-4)
    found, adapters = import_lora(tmp_path / "peft", MODELS[name])
    if found.adapter == model.adapter:  # the matrices of linear layers that share an input are equal
        assert_trees_close(adapters, params["adapters"], atol=0)
    np.testing.assert_allclose(our_logits(found, params | {"adapters": adapters}), expected, atol=1e-4)


def trained_adapter(peft, base, **options):
    """An adapter of peft whose matrices are random, each its own."""
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    return model


@uses_peft
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
        ("llama", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "layers_to_transform": [1]}),
    ],
)
def test_an_adapter_of_peft_gives_its_logits_here(name, options, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra gptjax[parity]")
    write_run(tmp_path / "base", Config(model=MODELS[name]), make_params(MODELS[name]), None)
    export_run(tmp_path / "base", ExportConfig(to=str(tmp_path / "hf"), family=name))
    theirs = trained_adapter(peft, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), **options)
    theirs.save_pretrained(tmp_path / "peft")
    expected = their_logits(theirs)
    import_run(tmp_path / "peft", tmp_path / "run", base=str(tmp_path / "base"))
    run = load_run(tmp_path / "run")
    assert np.abs(our_logits(MODELS[name], make_params(MODELS[name])) - expected).max() > 0.1
    np.testing.assert_allclose(our_logits(run.config.model, run.params), expected, atol=1e-4)


def test_adapters_that_have_no_place_here_are_errors(tmp_path):
    model, params = with_lora(LLAMA, ("attn/w_out",))
    export_lora(model, params, tmp_path / "peft", "llama")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())

    def refused(message, base=LLAMA, **fields):
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | fields))
        with pytest.raises(UserError, match=message):
            import_lora(tmp_path / "peft", base)

    refused("peft_type=LOHA is not supported", peft_type="LOHA")
    refused("use_dora=True is not supported; must be empty", use_dora=True)
    refused("bias=all is not supported", bias="all")
    refused("rank_pattern=", rank_pattern={"q_proj": 4})
    refused(r"matrices of shapes \[3, 24\] and \[24, 3\], must be \[4, 24\]", r=4)
    refused("has no place in a lora adapter of gptjax", base=dataclasses.replace(LLAMA, n_layer=1))
    with pytest.raises(UserError, match="name the run that it adapts as base"):
        import_run(tmp_path / "peft", tmp_path / "run")
