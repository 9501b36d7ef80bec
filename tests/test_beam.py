"""Beam search, held to `transformers` and to a search of all continuations."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.beam import beam_search
from gptjax.generation.decode import generate
from gptjax.generation.request import Request
from gptjax.generation.sample import samples
from gptjax.model.gpt import logits
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.imported import hf_model, our_model
from tests.test_controls import BYTES, END
from tests.test_decode import MODEL, make_params, make_prompts
from tests.tiny import hidden_states


@pytest.mark.parametrize(
    ("beams", "penalty", "controls", "theirs", "count"),
    [
        (2, 1.0, {}, {}, 20),
        (4, 0.0, {}, {}, 4),
        (4, 2.5, {}, {}, 4),
        (3, -1.0, {}, {}, 4),
        (
            3,
            1.0,
            {"repetition_penalty": 1.4, "no_repeat_ngram": 2},
            {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
            4,
        ),
    ],
)
def test_beams_are_those_of_transformers(beams, penalty, controls, theirs, count):
    torch = pytest.importorskip("torch")
    model, params = our_model()
    prompts = make_prompts(*range(4, 14), *range(3, 13), seed=4)[:count]
    options = SampleConfig(
        **{"max_new_tokens": 12, "temperature": 0, "num_beams": beams, "num_samples": beams, "length_penalty": penalty},
        **controls,
    )
    ours = beam_search(model, params, Request(prompts, options, END))
    ended = 0
    for prompt, rows in zip(prompts, ours, strict=True):
        inputs = torch.from_numpy(prompt)[None]
        expected = (
            hf_model()
            .generate(
                inputs,
                **{
                    "attention_mask": torch.ones_like(inputs),
                    "max_new_tokens": 12,
                    "do_sample": False,
                    "num_beams": beams,
                },
                **{"length_penalty": penalty, "num_return_sequences": beams, "eos_token_id": END, "pad_token_id": 0},
                **theirs,
            )[:, len(prompt) :]
            .tolist()
        )
        expected = [row[: row.index(END)] if END in row else row for row in expected]
        assert [row.tolist() for row in rows] == expected
        ended += sum(len(row) < 12 for row in expected)
    assert ended, "the test needs continuations that end"


def test_beams_wide_enough_find_the_best_of_all_continuations():
    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=24, vocab_size=6)
    params, prompt, new = make_params(model), np.array([1, 4, 2]), 4
    options = SampleConfig(max_new_tokens=new, temperature=0, num_beams=6 ** (new - 1))
    [[found]] = beam_search(model, params, Request([prompt], options))
    rows = np.array([[*prompt, *tail] for tail in itertools.product(range(6), repeat=new)])
    x_BTD = hidden_states(model, params, rows, jnp.broadcast_to(jnp.arange(7), rows.shape))
    log_p = np.asarray(jax.nn.log_softmax(logits(model, params, x_BTD)))[:, 2:-1]
    sums = np.take_along_axis(log_p, rows[:, 3:, None], axis=2).sum(axis=(1, 2))
    assert found.tolist() == rows[sums.argmax(), 3:].tolist()
    [[greedy]] = generate(model, params, [prompt], SampleConfig(max_new_tokens=new, temperature=0))
    assert greedy.tolist() != found.tolist(), "the test needs a model whose greedy choice is not the best"


def diverse_beams(model, prompt, options, end):
    """Diverse beam search over whole forward passes: the best texts of all groups, best first.

    As in arXiv:1610.02424, with Hamming diversity; each group searches as the one of `beam_search` does.
    """
    size, V = options.num_beams // options.beam_groups, model.vocab_size

    def log_probabilities(tokens):
        padded = np.zeros(model.block_size, np.int32)
        padded[: len(tokens)] = tokens
        x_1TD = hidden_states(model, make_params(model), padded[None], np.arange(model.block_size)[None])
        return np.asarray(jax.nn.log_softmax(logits(model, make_params(model), x_1TD)[0, len(tokens) - 1]))

    groups = [[(0.0, [])] for _ in range(options.beam_groups)]
    ended, improvable = [[] for _ in groups], [True] * options.beam_groups
    for length in range(1, options.max_new_tokens + 1):
        chosen_V = np.zeros(V)
        for number, beams in enumerate(groups):
            penalty_V = options.diversity_penalty * chosen_V
            flat = np.concatenate([s + log_probabilities([*prompt, *row]) - penalty_V for s, row in beams])
            best = [(flat[n], [*beams[n // V][1], n % V]) for n in np.argsort(-flat, kind="stable")[: 2 * size]]
            last = length == options.max_new_tokens
            for score, row in best[:size]:
                if (row[-1] == end or last) and improvable[number]:
                    ended[number].append((score / length, row))
            ended[number] = sorted(ended[number], key=lambda one: -one[0])[:size]
            groups[number] = beams = [(score, row) for score, row in best if row[-1] != end][:size]
            if len(ended[number]) == size:
                improvable[number] &= beams[0][0] / length > ended[number][-1][0]
            for _, row in groups[number]:
                chosen_V[row[-1]] += 1
    found = sorted((one for group in ended for one in group), key=lambda one: -one[0])
    texts = [row[:-1] if row[-1] == end else row for _, row in found]
    return texts[: options.num_samples]


@pytest.mark.parametrize(
    ("beams", "groups", "penalty"), [(6, 3, 0.5), (4, 2, 2.0), (4, 4, 1.0)], ids=["three", "two", "of one beam each"]
)
def test_groups_of_beams_are_those_of_the_paper(beams, groups, penalty):
    prompts = make_prompts(4, 7, 11, 6)
    options = SampleConfig(
        **{"max_new_tokens": 6, "temperature": 0, "num_beams": beams, "num_samples": beams},
        **{"beam_groups": groups, "diversity_penalty": penalty},
    )
    found = [
        [row.tolist() for row in rows] for rows in beam_search(MODEL, make_params(MODEL), Request(prompts, options))
    ]
    assert found == [diverse_beams(MODEL, prompt, options, None) for prompt in prompts]
    plain = dataclasses.replace(options, beam_groups=1, diversity_penalty=0.5)
    others = [
        [row.tolist() for row in rows] for rows in beam_search(MODEL, make_params(MODEL), Request(prompts, plain))
    ]
    assert found != others


def test_groups_that_end_do_not_count_end_of_text_as_chosen():
    options = SampleConfig(max_new_tokens=5, temperature=0, num_beams=4, num_samples=4, beam_groups=2)
    prompts, end = make_prompts(4, 7, 11, 6, 9), 3
    found = [beam_search(MODEL, make_params(MODEL), Request([prompt], options, end))[0] for prompt in prompts]
    assert [[row.tolist() for row in rows] for rows in found] == [
        diverse_beams(MODEL, p, options, end) for p in prompts
    ]
    assert any(len(row) < 5 for rows in found for row in rows), "the test needs continuations that end"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4, "beam_groups": 3}, "num_beams=4 must be a multiple of beam_groups=3"),
        ({"beam_groups": 2}, "beam_groups=2 has no effect without num_beams above 1"),
        ({"num_beams": 4, "diversity_penalty": 0.7}, "diversity_penalty=0.7 has no effect without beam_groups above 1"),
        ({"num_beams": 4, "beam_groups": 2, "diversity_penalty": 0.0}, "diversity_penalty=0.0 must be"),
    ],
)
def test_options_of_groups_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        SampleConfig(temperature=0, **options)


def test_a_prompts_beams_do_not_depend_on_other_prompts():
    options = SampleConfig(max_new_tokens=8, temperature=0, num_beams=3, num_samples=2)
    first, second = make_prompts(5, 14)
    together = beam_search(MODEL, make_params(MODEL), Request([first, second], options, 3))
    alone = beam_search(MODEL, make_params(MODEL), Request([first], options, 3))
    assert [row.tolist() for row in together[0]] == [row.tolist() for row in alone[0]]


def test_a_context_that_would_slide_is_refused():
    options = SampleConfig(max_new_tokens=20, temperature=0, num_beams=2)
    with pytest.raises(UserError, match=r"prompt 2 has 6 tokens.*model.block_size=24"):
        beam_search(MODEL, make_params(MODEL), Request(make_prompts(5, 6), options))


def test_texts_come_from_beams():
    options = SampleConfig(max_new_tokens=8, temperature=0, num_beams=3, num_samples=3, logit_bias=("97=9", "98=8"))
    [row] = samples(BYTES, make_params(BYTES), ByteTokenizer(), ["ab"], options)
    ids = beam_search(BYTES, make_params(BYTES), Request([np.array([97, 98])], options, 256))
    assert [sample.text for sample in row] == [ByteTokenizer().decode(tokens) for tokens in ids[0]]
    assert len({sample.text for sample in row}) == 3
