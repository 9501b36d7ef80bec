"""Speculative decoding: the tokens of greedy decoding, and the distribution of the model whatever is proposed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoints.run_dir import write_run
from gptjax.cli import main
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config, TokenizerConfig
from gptjax.config.verbs.chat import ChatConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.decode import NOTHING, generate, prepare, stream
from gptjax.generation.request import Request
from gptjax.generation.speculative import look_up, speculate
from gptjax.model.gpt import logits
from gptjax.serving.conversation import Conversation
from gptjax.text.tokenizers.plain import ByteTokenizer, CharTokenizer
from tests.test_chat import MODEL as CHAT_MODEL
from tests.test_chat import make_run, talk
from tests.test_decode import VARIANTS, make_params, make_prompts
from tests.tiny import hidden_states, init_params

DRAFT = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=40, vocab_size=37)
TINY = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=5)


def models(model, draft, options, rows, params=make_params):
    """Both laid out to decode."""
    return (prepare(one, params(one), options, rows) for one in (model, draft))


def joined(pieces):
    """The pieces of each row joined: tokens, and log-probabilities of the chosen ones."""
    rows = list(zip(*pieces, strict=True))
    tokens = [np.concatenate([piece.tokens_N for piece in row]).tolist() for row in rows]
    return tokens, [np.concatenate([p.logprobs.chosen_N for p in row]) for row in rows if row[0].logprobs]


@pytest.mark.parametrize("kind", ["model", "n-gram", pytest.param("itself", marks=pytest.mark.slow)])
def test_greedy_decoding_writes_the_tokens_of_plain_greedy_decoding(kind):
    model, told = VARIANTS["attention window"], []
    controls = {"repetition_penalty": 1.1, "no_repeat_ngram": 4, "logit_bias": ("7=2",), "min_new_tokens": 3}
    proposing = {"draft_ngram": 2} if kind == "n-gram" else {"draft_run_dir": "x"}
    shared = {"max_new_tokens": 11, "temperature": 0, "logprobs": 2, **({} if kind == "itself" else controls)}
    options = SampleConfig(**shared, **proposing, draft_tokens=3)
    prompts = [*make_prompts(1, 4, 9), np.array([5, 6, 7, 5, 6, 7, 5, 6])]
    words = ([3, 4], [9])
    plain = SampleConfig(**shared)
    expected, expected_logprobs = joined(
        stream(model, make_params(model), Request(prompts, plain, 2, words), piece_length=1)
    )
    target, draft = models(model, model if kind == "itself" else DRAFT, options, 4)
    request = Request(prompts, options, 2, words, notify=told.append)
    tokens, logprobs = joined(speculate(target, None if kind == "n-gram" else draft, request))
    assert tokens == expected
    for found, same in zip(logprobs, expected_logprobs, strict=True):
        np.testing.assert_allclose(found, same, atol=2e-5)  # several tokens at once are summed in another order
    [line] = told
    if kind == "itself":  # proposals behind the last token are counted too
        assert "proposed tokens were accepted (9" in line or "(100" in line
    else:
        assert "proposed tokens were accepted" in line


def exact_distribution(model, params, prompt, new, temperature):
    """The probability of every sequence of so many new tokens, by whole forward passes."""
    sequences = np.array(list(itertools.product(range(model.vocab_size), repeat=new)))
    whole = np.concatenate([np.broadcast_to(prompt, (len(sequences), len(prompt))), sequences], axis=1)
    positions = jnp.broadcast_to(jnp.arange(whole.shape[1]), whole.shape)
    x_BTD = hidden_states(model, params, jnp.asarray(whole), positions)
    log_p_BTV = np.asarray(jax.nn.log_softmax(logits(model, params, x_BTD) / temperature))
    places = np.arange(len(prompt) - 1, len(prompt) + new - 1)
    return np.exp(
        np.take_along_axis(log_p_BTV[:, places], sequences[:, :, None], axis=2)[:, :, 0].sum(1).astype(np.float64)
    )


def spread_params(model):
    """Weights of clear, but not certain predictions."""
    return jax.tree.map(
        lambda leaf: leaf * 6 if leaf.ndim > 1 else leaf + 0.1, init_params(model, jax.random.key(model.block_size))
    )


@pytest.mark.parametrize("kind", [pytest.param("model", marks=pytest.mark.slow), "n-gram"])
def test_sequences_have_the_distribution_of_the_model(kind):
    count, new, prompt = 20_000, 3, np.array([1, 2, 3, 1, 2])
    other = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=24, vocab_size=5)
    proposing = {"draft_ngram": 2} if kind == "n-gram" else {"draft_run_dir": "x"}
    options = SampleConfig(max_new_tokens=new, num_samples=count, temperature=1.5, draft_tokens=2, seed=3, **proposing)
    target, draft = models(TINY, other, options, count, spread_params)
    told = []
    request = Request([prompt], options, notify=told.append)
    tokens, _ = joined(speculate(target, None if kind == "n-gram" else draft, request))
    expected = count * exact_distribution(TINY, spread_params(TINY), prompt, new, 1.5)
    found = np.bincount(np.array(tokens) @ [25, 5, 1], minlength=125)
    chi_square = np.sum((found - expected) ** 2 / expected)
    # The statistic has mean 124 and standard deviation 15.7.
    assert chi_square < 124 + 4 * 15.7
    accepted, proposed = (int(word.replace(",", "")) for word in told[0].split()[1:4:2])
    assert 0.05 < accepted / proposed < 0.95, "some proposals are accepted and some are not"


@pytest.mark.slow
def test_rows_get_the_same_tokens_whatever_else_is_in_the_batch():
    options = SampleConfig(max_new_tokens=10, draft_run_dir="x", draft_tokens=3, num_samples=2, top_k=9, top_p=0.9)
    prompts = make_prompts(3, 5)
    together, _ = joined(speculate(*models(VARIANTS["plain"], DRAFT, options, 4), Request(prompts, options)))
    second = Request(prompts[1:], options, numbers=[1])
    alone, _ = joined(speculate(*models(VARIANTS["plain"], DRAFT, options, 2), second))
    assert together[2:] == alone
    assert alone[0] != alone[1]


def test_n_grams_propose_what_followed_the_last_time():
    contexts = [np.array(c) for c in ([1, 2, 3, 9, 1, 2, 4, 5, 1, 2], [7, 7, 8], [4, 1, 5, 6, 1], [3])]
    found = look_up(contexts, 2, 3)
    assert found.tolist() == [[4, 5, 1], [NOTHING] * 3, [5, 6, 1], [NOTHING] * 3]


@pytest.mark.slow
def test_chat_answers_with_a_draft_as_without():
    run = make_run()
    letters = {"logit_bias": tuple(f"{i}=40" for i in range(97, 107)), "max_new_tokens": 12, "temperature": 0}
    plain = Conversation(run, ChatConfig(run_dir="x", **letters), "")
    draft = Conversation(run, ChatConfig(run_dir="x", draft_run_dir="y", **letters), "", draft=(CHAT_MODEL, run.params))
    assert [talk(draft, text) for text in ("hi", "more")] == [talk(plain, text) for text in ("hi", "more")]
    assert "accepted" in draft.accepted and not plain.accepted


def test_wrong_drafts_are_named(tmp_path, capsys):
    def write(name, tokenizer, **changed):
        model = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=tokenizer.vocab_size, block_size=64, **changed)
        kind = "bytes" if isinstance(tokenizer, ByteTokenizer) else "chars"
        config = Config(run_dir=str(tmp_path / name), model=model, tokenizer=TokenizerConfig(kind=kind))
        write_run(tmp_path / name, config, make_params(model), tokenizer)

    write("run", ByteTokenizer())
    write("other", CharTokenizer("abc", False))
    shared = ["sample", "--run_dir", str(tmp_path / "run"), "--prompt", "abab", "--temperature", "0"]
    draft = "--draft_run_dir"
    assert main([*shared, "--max_new_tokens", "20", draft, str(tmp_path / "other")]) == 2
    assert "has another tokenizer than the run" in capsys.readouterr().err
    assert main([*shared, "--max_new_tokens", "60", "--draft_ngram", "2", "--draft_tokens", "2"]) == 2
    assert "max_new_tokens=60 and draft_tokens=2 more do not fit in model.block_size=64" in capsys.readouterr().err
    assert main([*shared, "--max_new_tokens", "20"]) == 0
    plain = capsys.readouterr().out
    assert main([*shared, "--max_new_tokens", "20", draft, str(tmp_path / "run")]) == 0
    found = capsys.readouterr()
    assert found.out == plain
    assert "proposed tokens were accepted" in found.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_run_dir": "x", "draft_ngram": 2}, "are both set"),
        ({"draft_tokens": 3}, "draft_tokens=3 has no effect"),
        ({"draft_ngram": 2, "num_beams": 2, "temperature": 0}, "draft_ngram=2 has no effect"),
        ({"draft_ngram": 2, "regex": "a"}, "draft_ngram=2 has no effect"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, message):
    with pytest.raises(UserError, match=message):
        SampleConfig(**options)


def test_a_draft_needs_no_more_room_than_it_says():
    options = SampleConfig(max_new_tokens=6, draft_ngram=2, draft_tokens=4, temperature=0)
    [prompt] = make_prompts(14)
    model, params = VARIANTS["plain"], make_params(VARIANTS["plain"])
    target, _ = models(model, DRAFT, options, 1)
    found, _ = joined(speculate(target, None, Request([prompt], options)))
    assert found == [generate(model, params, [prompt], SampleConfig(max_new_tokens=6, temperature=0))[0][0].tolist()]
    with pytest.raises(UserError, match=r"do not fit in model\.block_size=24"):
        speculate(target, None, Request(make_prompts(15), options))
