"""Beam search, held to `transformers` and to a search of all continuations."""

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
from gptjax.generation.sample import samples
from gptjax.model.gpt import hidden_states, logits
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.imported import hf_model, our_model
from tests.test_controls import BYTES, END
from tests.test_decode import MODEL, make_params, make_prompts


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
    ours = beam_search(model, params, prompts, options, end_of_text=END)
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
    [[found]] = beam_search(model, params, [prompt], options)
    rows = np.array([[*prompt, *tail] for tail in itertools.product(range(6), repeat=new)])
    x_BTD = jax.jit(hidden_states, static_argnums=0)(model, params, rows, jnp.broadcast_to(jnp.arange(7), rows.shape))
    log_p = np.asarray(jax.nn.log_softmax(logits(model, params, x_BTD)))[:, 2:-1]
    sums = np.take_along_axis(log_p, rows[:, 3:, None], axis=2).sum(axis=(1, 2))
    assert found.tolist() == rows[sums.argmax(), 3:].tolist()
    [[greedy]] = generate(model, params, [prompt], SampleConfig(max_new_tokens=new, temperature=0))
    assert greedy.tolist() != found.tolist(), "the test needs a model whose greedy choice is not the best"


def test_a_prompts_beams_do_not_depend_on_other_prompts():
    options = SampleConfig(max_new_tokens=8, temperature=0, num_beams=3, num_samples=2)
    first, second = make_prompts(5, 14)
    together = beam_search(MODEL, make_params(MODEL), [first, second], options, end_of_text=3)
    alone = beam_search(MODEL, make_params(MODEL), [first], options, end_of_text=3)
    assert [row.tolist() for row in together[0]] == [row.tolist() for row in alone[0]]


def test_a_context_that_would_slide_is_refused():
    options = SampleConfig(max_new_tokens=20, temperature=0, num_beams=2)
    with pytest.raises(UserError, match=r"prompt 2 has 6 tokens.*model.block_size=24"):
        beam_search(MODEL, make_params(MODEL), make_prompts(5, 6), options)


def test_texts_come_from_beams():
    options = SampleConfig(max_new_tokens=8, temperature=0, num_beams=3, num_samples=3, logit_bias=("97=9", "98=8"))
    [row] = samples(BYTES, make_params(BYTES), ByteTokenizer(), ["ab"], options)
    ids = beam_search(BYTES, make_params(BYTES), [np.array([97, 98])], options, end_of_text=256)
    assert [sample.text for sample in row] == [ByteTokenizer().decode(tokens) for tokens in ids[0]]
    assert len({sample.text for sample in row}) == 3
