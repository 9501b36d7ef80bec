"""Contrastive search, held to the formula of the paper over whole forward passes. Shape suffixes: T position, D n_embd,
V vocabulary."""

import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.contrastive import contrastive_search
from gptjax.generation.decode import generate
from gptjax.generation.request import Request
from gptjax.generation.sample import samples
from gptjax.model.gpt import logits
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.test_controls import BYTES
from tests.test_decode import MODEL, make_params, make_prompts
from tests.tiny import hidden_states

ROPE = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, block_size=24, vocab_size=37, positions="rope")
END = 3


def states_and_logits(model, tokens):
    """Final hidden states `[T, D]` and logits `[T, V]` of whole texts; the texts are padded at the end."""
    padded = np.zeros(model.block_size, np.int32)
    padded[: len(tokens)] = tokens
    x_1TD = hidden_states(model, make_params(model), padded[None], np.arange(model.block_size)[None])
    logits_1TV = logits(model, make_params(model), x_1TD)
    return np.asarray(x_1TD, np.float64)[0, : len(tokens)], np.asarray(logits_1TV, np.float64)[0, : len(tokens)]


def expected(model, prompt, options, repetition=1.0, end=END):
    """Equation 5 of arXiv:2202.06417, token by token."""
    tokens, alpha = prompt.tolist(), options.contrastive_alpha
    while len(tokens) < len(prompt) + options.max_new_tokens:
        states_TD, logits_TV = states_and_logits(model, tokens)
        last_V = logits_TV[-1]
        seen = np.isin(np.arange(len(last_V)), tokens)
        last_V = np.where(seen, np.where(last_V < 0, last_V * repetition, last_V / repetition), last_V)
        probs_V = np.exp(last_V - last_V.max()) / np.exp(last_V - last_V.max()).sum()
        scores = {}
        for token in np.argsort(-probs_V, kind="stable")[: options.top_k].tolist():
            new_D = states_and_logits(model, [*tokens, token])[0][-1]
            cosines_T = states_TD @ new_D / np.linalg.norm(states_TD, axis=1) / np.linalg.norm(new_D)
            scores[token] = (1 - alpha) * probs_V[token] - alpha * cosines_T.max()
        tokens.append(max(scores, key=lambda token: scores[token]))
        if tokens[-1] == end:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def search(model, prompts, options, **given):
    rows = [[] for _ in prompts]
    for pieces in contrastive_search(model, make_params(model), Request(prompts, options, END, **given)):
        for row, piece in zip(rows, pieces, strict=True):
            row += piece.tokens_N.tolist()
    return rows


@pytest.mark.parametrize(
    ("model", "alpha", "k", "repetition"),
    [(MODEL, 0.6, 4, 1.0), (MODEL, 0.9, 3, 1.5), (ROPE, 0.4, 5, 1.0)],
    ids=["plain", "with a penalty", "rope"],
)
def test_tokens_are_those_of_the_papers_formula(model, alpha, k, repetition):
    prompts = make_prompts(1, 4, 9, 12, 7, 3)
    options = SampleConfig(
        max_new_tokens=10, temperature=0, top_k=k, contrastive_alpha=alpha, repetition_penalty=repetition
    )
    found = search(model, prompts, options)
    assert found == [expected(model, prompt, options, repetition) for prompt in prompts]
    greedy = generate(model, make_params(model), prompts, SampleConfig(max_new_tokens=10, temperature=0))
    assert found != [row.tolist() for [row] in greedy]


def test_a_sequence_ends_when_it_is_finished_and_leaves_the_others():
    prompts = make_prompts(5, 6)
    options = SampleConfig(max_new_tokens=6, temperature=0, top_k=4, contrastive_alpha=0.6, ignore_end_of_text=True)
    whole = search(MODEL, prompts, options)
    counts = iter(range(1, 100))
    found = search(MODEL, prompts, options, is_finished=lambda row: row == 0 and next(counts) > 1)
    assert found == [whole[0][:2], whole[1]]


def test_text_and_log_probabilities_come_as_they_do_without():
    options = {"max_new_tokens": 8, "temperature": 0, "logprobs": 2, "logit_bias": ("97=9", "98=8.5")}
    [[sample]] = samples(
        *(BYTES, make_params(BYTES), ByteTokenizer(), ["ab"]),
        SampleConfig(**options, top_k=4, contrastive_alpha=0.7),
    )
    assert sample.text == ByteTokenizer().decode(sample.tokens)
    assert sample.logprobs is not None and sample.logprobs.chosen_N.shape == (8,)
    for number in range(8):
        _, logits_TV = states_and_logits(BYTES, [97, 98, *sample.tokens[:number]])
        log_p = logits_TV[-1] - np.log(np.exp(logits_TV[-1]).sum())
        assert sample.logprobs.chosen_N[number] == pytest.approx(log_p[sample.tokens[number]], abs=1e-3)
        assert sample.logprobs.ids_NK[number].tolist() == np.argsort(-log_p)[:2].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0}, "contrastive_alpha=0.6 needs temperature=0"),
        ({"top_k": 1}, "needs top_k of at least 2"),
        ({"contrastive_alpha": 1.5}, r"must lie in \[0, 1\]"),
        ({"num_beams": 2}, "contrastive_alpha=0.6 has no effect without num_beams=1"),
        ({"draft_ngram": 2}, "draft_ngram=2 has no effect without contrastive_alpha=0"),
        ({"num_samples": 2}, "num_samples=2 has no effect without contrastive_alpha=0"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        SampleConfig(**{"temperature": 0.0, "top_k": 4, "contrastive_alpha": 0.6} | options)


def test_a_banned_token_is_never_chosen():
    [prompt] = make_prompts(6)
    options = {"max_new_tokens": 8, "temperature": 0, "top_k": 37, "contrastive_alpha": 1.0, "ignore_end_of_text": True}
    [free] = search(MODEL, [prompt], SampleConfig(**options))
    bans = tuple(f"{token}=-10000" for token in set(free))
    [found] = search(MODEL, [prompt], SampleConfig(**options, logit_bias=bans))
    assert len(found) == 8 and not set(free) & set(found)


def test_a_text_longer_than_the_context_is_refused():
    whole = SampleConfig(max_new_tokens=18, temperature=0, top_k=4, contrastive_alpha=0.6, ignore_end_of_text=True)
    prompts = make_prompts(6)
    assert search(MODEL, prompts, whole) == [expected(MODEL, prompt, whole, end=None) for prompt in prompts]
    with pytest.raises(UserError, match=r"prompt 1 has 7 tokens"):
        search(MODEL, make_prompts(7), whole)
    options = SampleConfig(max_new_tokens=20, temperature=0, top_k=4, contrastive_alpha=0.6)
    with pytest.raises(UserError, match=r"contrastive_alpha=0.6: prompt 2 has 6 tokens.*model.block_size=24"):
        search(MODEL, make_prompts(4, 6), options)
