"""Configs, flags and sampling options that mean nothing, through the command line."""

import io
import itertools
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.model.cache import init_cache
from gptjax.model.gpt import logits
from tests.faults.inputs import MODEL, accepted, make_run, params, refused
from tests.tiny import extend, hidden_states, layer_by_layer

CONFIGS = {
    "unknown key": ("model: {n_layers: 2}", "unknown key 'model.n_layers' in section 'model'. Did you mean 'n_layer'?"),
    "unknown section": ("modle: {}", "unknown key 'modle'. Did you mean 'model'?"),
    "wrong type": ("model: {n_layer: two}", "model.n_layer='two' must be a whole number"),
    "list for a number": ("seed: [1]", "seed=[1] must be a whole number"),
    "heads that do not divide": ("model: {n_embd: 100, n_head: 3}", "the nearest that is: 99"),
    "no steps": ("train: {num_steps: 0}", "train.num_steps=0 must be at least 1"),
    "1e30 steps": ("train: {num_steps: 1.0e+30}", "train.num_steps=1e+30 must be a whole number"),
    "2**70": ("model: {n_embd: 1180591620717411303424}", "model.n_embd=1180591620717411303424 is too large"),
    "2**40": ("train: {num_steps: 1099511627776}", "train.num_steps=1099511627776 must be at most 2147483647"),
    "a model for no machine": ("model: {n_embd: 12000000}", "parameters, must be at most 1.0e+13"),
    "a batch for no machine": (
        "train: {batch_size: 9000000}",
        "times model.block_size=1024 must be at most 2147483647",
    ),
    "a number of 5,000 digits": (f"seed: {'9' * 5000}", "not valid YAML"),
    "a rate beyond float32": ("optim: {learning_rate: 1e300}", "optim.learning_rate='1e300' is too large"),
    "Python object": ("seed: !!python/object/apply:os.system ['touch {ran}']", "not valid YAML"),
    "Python name": ("seed: !!python/name:os.system", "not valid YAML"),
    "no number under its tag": ('seed: !!int ""', "not valid YAML: a value is not of the kind that its !!tag names"),
    "no boolean under its tag": ("log: {wandb: !!bool maybe}", "not of the kind that its !!tag names"),
    "no date under its tag": ("seed: !!timestamp today", "not of the kind that its !!tag names"),
    "nested a thousand times": ("seed: " + "[" * 1000, "not valid YAML"),
    "NUL": ("run_dir: a\0b", "not valid YAML"),
    "aliases that grow to a billion": (
        "data: {path: [&a [x], "
        + ", ".join(f"&{b} [{','.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghij"))
        + "]}",
        "data.path=[",
    ),
    "not text at all": ("\x89PNG\r\n\x1a\n\0\0", "not valid YAML"),
}


@pytest.mark.fault(
    46, "a config with unknown keys, wrong types, huge numbers, Python objects", "one line, the nearest key"
)
@pytest.mark.parametrize("fault", CONFIGS)
def test_config(tmp_path, capsys, seen, fault):
    text, message = CONFIGS[fault]
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("{ran}", str(tmp_path / "ran")), encoding="utf-8")
    line = refused(capsys, "train", path)
    assert message in line and len(line) < 1500
    assert not (tmp_path / "ran").exists()
    seen(line.replace(str(tmp_path), "")[:160])


FLAGS = {
    ("--model.n_layrs", "2"): "unknown option --model.n_layrs. Did you mean 'model.n_layer'?",
    ("--n_layer", "2"): "unknown option --n_layer. Did you mean 'model.n_layer'?",
    ("--train.num_steps", "1e30"): "train.num_steps='1e30' must be a whole number",
    ("--train.num_steps", str(2**70)): "is too large",
    ("--train.num_steps", "9" * 5000): "must be a whole number",
    ("--train.num_steps",): "--train.num_steps needs a value",
    ("--optim.learning_rate", "nan"): "must be a number",
    ("--seed", "-1"): "seed=-1 must lie in [0, 2**32)",
    ("--run_dir", ""): "run_dir is empty",
    ("--cache_dir", "~nobody-here/x"): "is not a usable path",
    ("--cache_dir", "/proc/version/x"): "/proc/version/x",
    ("--run_dir", "/proc/version/x", "--data.source", "python-stdlib"): "/proc/version/x",
    ("--run_dir", "x" * 5000, "--data.source", "python-stdlib"): "File name too long",
    ("--data.path", "x" * 5000): "no such file or folder",
    ("stray",): "unexpected 'stray'",
    ("--line\nbreak", "x"): "unknown option --line break",
}


@pytest.mark.fault(
    46, "flags that are unknown, misspelt, of the wrong type, without a value", "one line, the nearest flag"
)
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags)[:40])
def test_flag(tmp_path, capsys, seen, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("tokenizer: {kind: bytes}\ncache_dir: cache\n")
    line = refused(capsys, "train", "c.yaml", *flags)
    assert FLAGS[flags] in line
    seen(line[:160])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("options") / "run")


OPTIONS = {
    ("--temperature", "-1"): "temperature=-1.0 must not be negative",
    ("--temperature", "nan"): "temperature='nan' must be a number",
    ("--temperature", "inf"): "temperature='inf' is too large",
    ("--temperature", "1e-9"): "temperature=1e-09 must be 0 (the most likely token) or at least 0.001",
    ("--temperature", "1e300"): "is too large",
    ("--top_k", "-1"): "top_k=-1 must not be negative",
    ("--top_k", "258"): "top_k=258 must be at most model.vocab_size=257",
    ("--top_p", "0"): "top_p=0.0 must lie in (0, 1]",
    ("--top_p", "1.01"): "top_p=1.01 must lie in (0, 1]",
    ("--top_k", "5", "--temperature", "0"): "has no effect without temperature above 0",
    ("--max_new_tokens", "0"): "max_new_tokens=0 must be at least 1",
    ("--max_new_tokens", "-5"): "max_new_tokens=-5 must be at least 1",
    ("--max_new_tokens", str(2**40)): "must be at most 2147483647",
    ("--num_samples", "0"): "num_samples=0 must be at least 1",
    ("--num_samples", str(2**30)): "at most 65536",
    ("--seed", "-1"): "seed=-1 must lie in",
    ("--prompt", ""): "prompt 2 is empty",
    ("--prompt", "\ud800"): "prompt 2 is not UTF-8",
}


@pytest.mark.fault(
    47, "sampling options out of range, an empty prompt, half a surrogate pair", "one line with the rule"
)
@pytest.mark.parametrize("options", OPTIONS, ids=ascii)
def test_sampling_option(run_dir, capsys, seen, options):
    line = refused(capsys, "sample", "--run_dir", run_dir, "--prompt", "a", *options)
    assert OPTIONS[options] in line
    seen(line)


def sample(capsys, run_dir, *args) -> str:
    return accepted(capsys, "sample", "--run_dir", run_dir, "--ignore_end_of_text", "true", *args)


@pytest.mark.fault(47, "extremes: temperature 0, 0.001 and 1e9, top_k 1", "work: the most likely token, or any")
def test_sampling_extremes(run_dir, capsys, seen):
    args = ("--prompt", "abc", "--max_new_tokens", "12")
    greedy = sample(capsys, run_dir, *args, "--temperature", "0")
    assert sample(capsys, run_dir, *args, "--top_k", "1") == greedy
    assert sample(capsys, run_dir, *args, "--temperature", "0.001") == greedy
    assert sample(capsys, run_dir, *args, "--temperature", "1e9") != greedy
    seen("temperature 0 and 0.001 and top_k 1 give the same text; temperature 1e9 another")


@pytest.mark.fault(
    47, "a prompt longer than the context, more new tokens than the context", "its tail is read; slides; said"
)
def test_long_prompt_and_long_sample(run_dir, capsys, seen):
    prompt = "0123456789" * 3
    long = sample(capsys, run_dir, "--prompt", prompt, "--max_new_tokens", "3", "--temperature", "0")
    tail = sample(capsys, run_dir, "--prompt", prompt[-16:], "--max_new_tokens", "3", "--temperature", "0")
    assert long == prompt[:-16] + tail
    capsys.readouterr()
    sample_args = ["--run_dir", str(run_dir), "--prompt", prompt, "--max_new_tokens", "40"]
    from gptjax.cli import main

    assert main(["sample", *sample_args]) == 0
    told = capsys.readouterr().err.splitlines()
    assert "the prompt has 30 tokens; the model reads its last 16" in told[0]
    assert "slides to its last 8 tokens" in told[1]
    seen("; ".join(told))


@pytest.mark.fault(47, "<|endoftext|> and NUL in a prompt", "plain text; the special token with --allow_special")
def test_special_text_in_a_prompt(run_dir, tmp_path, capsys, seen, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"a\0b<|endoftext|>")
    outputs = []
    for flags in ((), ("--allow_special", "true")):
        args = ("--prompt_file", tmp_path / "prompt.txt", "--max_new_tokens", "9", "--temperature", "0", *flags)
        outputs.append(sample(capsys, run_dir, *args))
        assert outputs[-1].startswith("a\0b<|endoftext|>")
    assert outputs[0] != outputs[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\0b<|endoftext|>")))
    assert sample(capsys, run_dir, "--max_new_tokens", "9", "--temperature", "0") == outputs[0]
    seen("read as plain text; another continuation with --allow_special true")


@pytest.mark.fault(47, "prompts of different lengths in a batch", "each is continued as if it were alone")
def test_prompts_of_different_lengths(run_dir, capsys, seen):
    prompts = ["a", "bcdefgh", "ij" * 20]
    options = ("--temperature", "0", "--max_new_tokens", "20")
    together = sample(capsys, run_dir, *itertools.chain(*(("--prompt", prompt) for prompt in prompts)), *options)
    alone = [sample(capsys, run_dir, "--prompt", prompt, *options) for prompt in prompts]
    assert together == "".join(f"{text[:-1]}\n---------------\n" for text in alone)
    seen("3 prompts of 1, 7 and 40 tokens: the same text together and alone")


@pytest.mark.fault(47, "characters cut between tokens while text is streamed", "bytes wait until they are valid")
def test_characters_that_are_cut_while_streaming(run_dir, capsys, seen):
    args = ("--prompt", "é", "--max_new_tokens", "64", "--temperature", "5")
    streamed = sample(capsys, run_dir, *args)
    [first, _] = sample(capsys, run_dir, *args, "--num_samples", "2").split("\n---------------\n")[:2]
    assert streamed == first + "\n" and "\ufffd" in streamed
    seen("64 random bytes: the streamed text is that of all bytes decoded at once")


@pytest.mark.fault(47, "logits from the cache", "equal those of a whole forward pass")
def test_cached_logits(seen):
    tokens_BT = np.random.default_rng(0).integers(0, 257, (3, 16))
    positions_BT = jnp.tile(jnp.arange(16), (3, 1))
    x_BTD = hidden_states(MODEL, params(), tokens_BT, positions_BT)
    whole = logits(MODEL, params(), x_BTD)
    cache, parts = init_cache(MODEL, jnp.zeros(3, jnp.int32), 16, jnp.float32), []
    layers = layer_by_layer(MODEL, params())
    for start in range(16):
        x_BTD, cache = extend(MODEL, layers, jnp.asarray(tokens_BT[:, start : start + 1]), cache, "float32")
        parts.append(logits(MODEL, params(), x_BTD))
    difference = float(jnp.abs(jnp.concatenate(parts, axis=1) - whole).max())
    assert difference < 1e-4  # float32 sums in another order
    seen(f"largest difference {difference:.0e}")
