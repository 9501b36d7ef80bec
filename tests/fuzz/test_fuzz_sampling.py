"""Prompts and sampling options: text comes out, or the request is refused in one line."""

import functools

import jax
from hypothesis import strategies as st

from gptjax.config.model import ModelConfig
from gptjax.config.reader import from_dict, read_flags
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.sample import sample_texts
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.fuzz.fuzz import ODD_NUMBER, ODD_TEXT, fuzz, refusals
from tests.tiny import init_params

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=257)
PROMPT = st.one_of(st.text(max_size=20), ODD_TEXT, st.sampled_from(["<|endoftext|>", "a<|endoftext|>", "abc" * 20]))
NUMBER = st.one_of(ODD_NUMBER, st.sampled_from([0, 0.001, 0.5, 1, 5, 257]))


@functools.cache
def params() -> dict:
    return init_params(MODEL, jax.random.key(0))


@fuzz(
    60,
    st.lists(PROMPT, min_size=1, max_size=2),
    st.dictionaries(st.sampled_from(["temperature", "top_k", "top_p", "seed"]), NUMBER, max_size=2),
    st.sampled_from([1, 3, 40]),
    st.booleans(),
)
def test_prompts_and_options(prompts, numbers, length, special):
    flags = [f"--{name}={value}" for name, value in numbers.items()]
    flags += [f"--max_new_tokens={length}", f"--allow_special={special}"]
    pieces = {}
    with refusals():
        options = from_dict(SampleConfig, read_flags(SampleConfig, flags), "command line")

        def take(prompt, sample, piece):
            pieces[prompt, sample] = pieces.get((prompt, sample), "") + piece

        texts = sample_texts(MODEL, params(), ByteTokenizer(), prompts, options, on_text=take)
        assert [pieces.get((i, 0), "") for i in range(len(prompts))] == [text for [text] in texts]
        for text in texts:
            text[0].encode()
