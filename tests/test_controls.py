"""Controls of sampling, held to `transformers` or to NumPy. Shape suffixes: B row, T position, V vocabulary."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.choose import _filtered as filtered
from gptjax.generation.choose import choice_numbers, choice_rule
from gptjax.generation.controls import BANNED, control, make_history
from gptjax.generation.decode import generate, stream
from gptjax.generation.request import Request
from gptjax.generation.sample import bad_word_ids, sample_texts, samples, tokens_of
from gptjax.generation.stream import StopFilter
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.imported import VOCAB_SIZE, hf_model, our_model
from tests.test_decode import MODEL, make_params, make_prompts

V = VOCAB_SIZE
END = 5
# Options; the same as those of transformers' `generate`; banned sequences.
CASES = {
    "bias": ({"logit_bias": ("3=2.5", "7=-4", "9=0.5")}, {"sequence_bias": {(3,): 2.5, (7,): -4.0, (9,): 0.5}}, ()),
    "repetition": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}, ()),
    "repetition below 1": ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}, ()),
    "1-grams": ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}, ()),
    "2-grams": ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}, ()),
    "3-grams": ({"no_repeat_ngram": 3}, {"no_repeat_ngram_size": 3}, ()),
    "words": ({}, {"bad_words_ids": [[4], [1, 2], [0, 1, 2, 3]]}, ((4,), (1, 2), (0, 1, 2, 3))),
    "minimum": ({"min_new_tokens": 9}, {"min_new_tokens": 9, "eos_token_id": END}, ()),
    "all": (
        {"repetition_penalty": 1.3, "no_repeat_ngram": 3, "logit_bias": ("3=2.5",), "min_new_tokens": 4},
        {
            **{"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "sequence_bias": {(3,): 2.5}},
            **{"bad_words_ids": [[4], [1, 2]], "min_new_tokens": 4, "eos_token_id": END},
        },
        ((4,), (1, 2)),
    ),
}
FILTERS = {
    "min_p": ({"min_p": 0.2}, {"min_p": 0.2}),
    "typical_p": ({"typical_p": 0.6}, {"typical_p": 0.6}),
    "temperature and top_p": ({"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.7, "top_p": 0.8}),
    "top_k, top_p, min_p, typical_p": (
        {"temperature": 1.5, "top_k": 0, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9},
    ),
}


def processors(theirs, prompt_length=6, **sampling):
    """The processors that `generate` of `transformers` makes of its options."""
    transformers = pytest.importorskip("transformers")
    model = hf_model()
    config = transformers.GenerationConfig(**theirs, **sampling)
    model._prepare_special_tokens(config, True)
    return model._get_logits_processor(config, input_ids_seq_length=prompt_length, device="cpu")


@pytest.mark.parametrize("case", CASES)
def test_controlled_logits_are_those_of_transformers(case):
    torch = pytest.importorskip("torch")
    options, theirs, words = CASES[case]
    options = SampleConfig(temperature=0, **options)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, 4, (5, 12))  # few different tokens, so that n-grams repeat and words are begun
    logits_BV = rng.normal(size=(5, V)).astype(np.float32) * 3
    expected = processors(theirs)(torch.from_numpy(tokens_BT), torch.from_numpy(logits_BV.copy())).numpy()
    controls = Request([], options, END, words).controls(V, 5)
    history = make_history(controls.rule, list(tokens_BT), 4, V)
    ours = np.asarray(jax.jit(control)(logits_BV, controls, history, np.int32(6)))  # six of the tokens are the prompt
    assert not np.array_equal(expected, logits_BV), "the test needs logits that change"
    np.testing.assert_array_equal(ours <= BANNED / 2, np.isinf(expected))
    np.testing.assert_allclose(
        np.where(np.isinf(expected), 0, ours), np.where(np.isinf(expected), 0, expected), rtol=1e-6
    )


@pytest.mark.parametrize("case", FILTERS)
def test_tokens_that_filters_leave_are_those_of_transformers(case):
    torch = pytest.importorskip("torch")
    options, theirs = FILTERS[case]
    options = SampleConfig(**options)
    logits_BV = np.random.default_rng(3).normal(size=(40, V)).astype(np.float32) * 2
    expected = processors(theirs | {"do_sample": True})(None, torch.from_numpy(logits_BV)).numpy()
    scores = jnp.asarray(logits_BV) / options.temperature
    ours = np.asarray(jax.jit(filtered, static_argnums=1)(scores, choice_rule(options), choice_numbers(options, 40)))
    assert np.isinf(expected).any()
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected))


@pytest.mark.parametrize("case", CASES)
def test_greedy_decoding_with_controls_chooses_the_tokens_of_transformers(case):
    torch = pytest.importorskip("torch")
    model, params = our_model()
    options, theirs, words = CASES[case]
    prompts = make_prompts(*range(4, 14), *range(3, 13), seed=4)
    end = theirs.get("eos_token_id")
    options = SampleConfig(max_new_tokens=20, temperature=0, **options)
    ours = generate(model, params, prompts, options, end_of_text=end, bad_words=words)
    plain = generate(model, params, prompts, SampleConfig(max_new_tokens=20, temperature=0), end_of_text=end)
    assert any(sample.tolist() != other.tolist() for [sample], [other] in zip(ours, plain, strict=True))
    for prompt, [sample] in zip(prompts, ours, strict=True):
        inputs = torch.from_numpy(prompt)[None]
        given = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 20, "do_sample": False}
        if end is not None:
            given["pad_token_id"] = 0
        expected = hf_model().generate(inputs, **given, **theirs)[0, len(prompt) :].tolist()
        expected = expected[: expected.index(end)] if end in expected else expected
        assert sample.tolist() == expected


def test_presence_and_frequency_are_subtracted_for_new_tokens_alone():
    options = SampleConfig(presence_penalty=0.7, frequency_penalty=0.2)
    controls = Request([], options).controls(V, 1)
    history = make_history(controls.rule, [np.array([1, 2, 2])], 4, V)
    history = history._replace(counts_BV=jnp.zeros((1, V), jnp.int32).at[0, 3].set(2).at[0, 2].set(1))
    logits_1V = np.linspace(-1, 1, V, dtype=np.float32)[None]
    ours = control(logits_1V, controls, history, 3)
    expected = logits_1V.copy()
    expected[0, 3] -= 0.7 + 2 * 0.2
    expected[0, 2] -= 0.7 + 0.2
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_penalties_of_new_tokens_are_counted_in_the_compiled_loop():
    """A penalty above all logits: no token comes a second time before every one came once."""
    options = SampleConfig(max_new_tokens=V, temperature=0, presence_penalty=1e4)
    for [sample] in generate(MODEL, make_params(MODEL), make_prompts(3, 9), options):
        assert sorted(sample.tolist()) == list(range(V))
    options = SampleConfig(max_new_tokens=V, temperature=0, frequency_penalty=1e4)
    for [sample] in generate(MODEL, make_params(MODEL), make_prompts(3, 9), options):
        assert sorted(sample.tolist()) == list(range(V))


@pytest.mark.parametrize(
    "controls",
    [{"repetition_penalty": 1.5, "frequency_penalty": 0.4}, {"no_repeat_ngram": 2}, {"typical_p": 0.7, "min_p": 0.02}],
)
def test_a_sample_with_controls_does_not_depend_on_the_batch_or_the_pieces(controls):
    first, second = make_prompts(5, 17)
    options = SampleConfig(max_new_tokens=40, seed=9, **controls)
    together = generate(MODEL, make_params(MODEL), [first, second], options)
    [[alone]] = generate(MODEL, make_params(MODEL), [first], options)
    np.testing.assert_array_equal(together[0][0], alone)
    pieces = list(stream(MODEL, make_params(MODEL), Request([first, second], options), piece_length=3))
    joined = [np.concatenate([piece.tokens_N for piece in row]).tolist() for row in zip(*pieces, strict=True)]
    assert joined == [row[0].tolist() for row in together]


def test_log_probabilities_are_those_of_a_full_forward_pass():
    from gptjax.model.gpt import hidden_states, logits

    [prompt] = make_prompts(4)
    options = SampleConfig(max_new_tokens=12, logprobs=3, temperature=0.5, repetition_penalty=1.4, seed=2)
    params = make_params(MODEL)
    pieces = [piece for [piece] in stream(MODEL, params, Request([prompt], options), piece_length=5)]
    tokens = np.concatenate([prompt, *(piece.tokens_N for piece in pieces)])
    chosen, ids, top = (np.concatenate(part) for part in zip(*(piece.logprobs for piece in pieces), strict=True))
    x_1TD = jax.jit(hidden_states, static_argnums=0)(MODEL, params, tokens[None, :-1], jnp.arange(15)[None])
    expected = np.asarray(jax.nn.log_softmax(logits(MODEL, params, x_1TD)))[0, 3:]
    np.testing.assert_allclose(chosen, expected[np.arange(12), tokens[4:]], atol=2e-5)  # sums in another order
    np.testing.assert_allclose(top, np.sort(expected)[:, :-4:-1], atol=2e-5)
    np.testing.assert_array_equal(ids, np.argsort(-expected)[:, :3])


# --- stop strings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abcdef", ["cd"], "ab"),
        ("abcdef", ["x"], "abcdef"),
        ("aab", ["ab"], "a"),
        ("abababc", ["ababc"], "ab"),
        ("abcd", ["abcde", "bc"], "a"),
        ("abcd", ["bcd", "abcd"], ""),
        ("ab", ["b", "ab"], ""),
        ("ends in a half stop str", ["stop string"], "ends in a half stop str"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_text_is_cut_before_the_first_stop_string_whatever_the_pieces(text, stops, expected, size):
    stop_filter, found = StopFilter(stops), ""
    for at in range(0, len(text), size):
        found += stop_filter.feed(text[at : at + size])
        assert expected.startswith(found), "text was given out that is not certain yet"
    found += stop_filter.feed("", final=True)
    assert found == expected
    assert stop_filter.found == (text != expected)


BYTES = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=257)


def run_samples(prompts, on_text=None, **options):
    arguments = BYTES, make_params(BYTES), ByteTokenizer(), prompts, SampleConfig(**options)
    return samples(*arguments, on_text=on_text)


def test_a_stop_string_over_several_tokens_ends_its_row_alone():
    """With a byte tokenizer every stop string of two characters spans tokens."""
    options = {
        "max_new_tokens": 60,
        "seed": 3,
        "temperature": 0.8,
        "logit_bias": tuple(f"{i}=30" for i in range(97, 103)),
    }
    [[first], [second]] = run_samples(["a", "bcd"], **options)
    stop = first.text[20:22]
    expected = [text.text[: text.text.index(stop)] if stop in text.text else text.text for text in (first, second)]
    pieces: dict = {0: "", 1: ""}

    def take(prompt, _sample, piece):
        pieces[prompt] += piece

    found = run_samples(["a", "bcd"], on_text=take, stop=(stop,), **options)
    assert [row[0].text for row in found] == expected
    assert list(pieces.values()) == expected
    assert found[0][0].finish == "stop"
    assert bytes(found[0][0].tokens).decode() == expected[0]


def test_a_sample_says_how_it_ended():
    [[sample]] = run_samples(["a"], max_new_tokens=5, logit_bias=("256=-100",))
    assert sample.finish == "length"
    assert len(sample.tokens) == 5
    [[sample]] = run_samples(["a"], max_new_tokens=5, logit_bias=("256=1000",))
    assert (sample.finish, sample.text, sample.tokens) == ("stop", "", [])


def test_tokens_are_cut_where_the_text_is():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("né→x")
    assert [tokens_of(tokenizer, ids, n) for n in range(6)] == [0, 1, 3, 6, 7, 7]


def test_bad_words_are_not_written():
    options = {"max_new_tokens": 200, "seed": 3, "logit_bias": tuple(f"{i}=30" for i in b"abc")}
    [[plain]] = run_samples(["a"], **options)
    assert "ab" in plain.text
    [[without]] = run_samples(["a"], bad_words=("ab", "cc"), **options)
    assert len(without.tokens) == 200
    assert "ab" not in f"a{without.text}"
    assert "cc" not in without.text
    assert bad_word_ids(ByteTokenizer(), ["ab", "b"]) == [[98]], "words that end in a shorter one are banned by it"


def test_the_least_number_of_tokens_comes_before_end_of_text():
    options = {"max_new_tokens": 40, "logit_bias": ("256=1000",)}
    [[sample]] = run_samples(["a"], min_new_tokens=7, **options)
    assert len(sample.tokens) == 7


def test_sample_texts_is_the_text_of_samples():
    arguments = BYTES, make_params(BYTES), ByteTokenizer(), ["a", "b"], SampleConfig(num_samples=2, max_new_tokens=9)
    assert sample_texts(*arguments) == [[sample.text for sample in row] for row in samples(*arguments)]


# --- the command line -------------------------------------------------------------------------------------------


def test_tokens_and_probabilities_on_the_command_line(tmp_path, capsys):
    from gptjax.checkpoints.run_dir import write_run
    from gptjax.cli import main
    from gptjax.config.run import Config
    from gptjax.config.tokenizer import TokenizerConfig

    run_dir = tmp_path / "run"
    config = Config(run_dir=str(run_dir), model=BYTES, tokenizer=TokenizerConfig(kind="bytes"))
    write_run(run_dir, config, make_params(BYTES), ByteTokenizer())
    command = ["sample", "--run_dir", str(run_dir), "--prompt", "ab", "--max_new_tokens", "6", "--logit_bias"]
    command += [f"{i}=30" for i in b"xyz"]
    assert main([*command, "--logprobs", "2", "--json", "--num_samples", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["finish_reason"] == "length"
        assert bytes(line["tokens"]).decode() == line["text"] == "".join(token["text"] for token in line["logprobs"])
        assert all(len(token["top"]) == 2 for token in line["logprobs"])
    assert main([*command, "--logprobs", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"ab{lines[0]['text']}\n")
    assert shown.count("%") == 6 * 3


def test_tokens_are_coloured_by_their_probability():
    from gptjax.report.tokens import style_of

    assert [style_of(np.log(p)) for p in (0.9, 0.3, 0.05, 0.001)] == [
        *("black on green3", "black on gold1", "black on dark_orange", "white on red3")
    ]
