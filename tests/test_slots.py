"""Continuous batching: sequences that come and go get the tokens that they get alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation import slots as slots_module
from gptjax.generation.decode import BUFFER, generate, prepare
from gptjax.generation.slots import BURST_SECONDS, CHUNKS, Row, SlotDecoder, burst_length, chunk_shape
from gptjax.model import cache as kv
from gptjax.model.cache import init_cache
from gptjax.model.gpt import logits
from tests.test_decode import VARIANTS, make_params
from tests.tiny import extend, hidden_states, init_params, layer_by_layer

MODEL = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, block_size=64, vocab_size=37)
LONG = dataclasses.replace(MODEL, block_size=320)


def decoder(model=MODEL, slots=3):
    return SlotDecoder(prepare(model, make_params(model), SampleConfig(), slots), slots)


def run(slot_decoder, rows, arrive=lambda row: 0, most=10_000):
    """Decodes rows, of which each may start from a step on; returns the new tokens of each."""
    tokens = {id(row): [] for row in rows}
    waiting, step = list(rows), 0
    while waiting or slot_decoder.rows:
        while waiting and slot_decoder.free and arrive(waiting[0]) <= step:
            slot_decoder.start(waiting.pop(0))
        for event in slot_decoder.step():
            tokens[id(event.row)] += event.piece.tokens_N.tolist()
        step += 1
        assert step < most
    return [tokens[id(row)] for row in rows]


def alone(model, row):
    """What `generate` gives for a row alone; rows of other numbers come before it."""
    prompt_number, sample = row.number
    options = dataclasses.replace(row.options, num_samples=sample + 1)
    prompts = [row.prompt] * (prompt_number + 1)
    return generate(model, make_params(model), prompts, options, end_of_text=row.end_of_text)[prompt_number][
        sample
    ].tolist()


def make_rows(count, seed=0, longest=40, **options):
    rng = np.random.default_rng(seed)
    return [
        Row(
            rng.integers(0, 37, rng.integers(1, longest), dtype=np.int32),
            SampleConfig(max_new_tokens=int(rng.integers(1, 24)), seed=number, **options),
            end_of_text=3,
        )
        for number in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {},
        {"temperature": 0.8, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "logit_bias": ("7=2", "3=2"), "min_new_tokens": 1},
    ],
    ids=["greedy", "plain", "filters", "controls"],
)
def test_sequences_that_come_and_go_get_the_tokens_that_they_get_alone(options):
    rows = make_rows(7, **options)
    arrivals = {id(row): 2 * number for number, row in enumerate(rows)}
    found = run(decoder(), rows, lambda row: arrivals[id(row)])
    assert found == [alone(MODEL, row) for row in rows]
    assert any(len(tokens) < row.options.max_new_tokens for tokens, row in zip(found, rows, strict=True))


@pytest.mark.slow
def test_each_sequence_keeps_its_own_options_beside_others():
    rows = [
        Row(np.arange(5, dtype=np.int32), SampleConfig(max_new_tokens=20, seed=4, **options))
        for options in (
            {"temperature": 0},
            {"top_p": 0.5, "temperature": 1.3},
            {"presence_penalty": 3.0},
            {"typical_p": 0.5},
            {},
        )
    ]
    found = run(decoder(slots=5), rows)
    for row, tokens in zip(rows, found, strict=True):
        assert tokens == alone(MODEL, row)


def test_a_rows_top_k_bounds_its_tokens_beside_others():
    """The tokens are other ones than those of `generate`, which draws among `top_k` candidates alone."""
    prompt = np.arange(5, dtype=np.int32)
    rows = [Row(prompt, SampleConfig(max_new_tokens=1, seed=seed, top_k=k)) for seed in range(40) for k in (0, 2)]
    found = run(decoder(slots=8), rows)
    assert len({tokens[0] for tokens in found[1::2]}) == 2
    assert len({tokens[0] for tokens in found[::2]}) > 2


def test_samples_of_one_prompt_differ_and_are_those_of_generate():
    prompt = np.arange(6, dtype=np.int32)
    rows = [Row(prompt, SampleConfig(max_new_tokens=9, seed=5), number=(0, sample)) for sample in range(3)]
    found = run(decoder(), rows)
    assert found == [alone(MODEL, row) for row in rows]
    assert len(set(map(tuple, found))) == 3


def test_a_long_prompt_is_read_between_the_steps_of_others():
    rng = np.random.default_rng(0)
    short = Row(rng.integers(0, 37, 4, dtype=np.int32), SampleConfig(max_new_tokens=12))
    long = Row(rng.integers(0, 37, 290, dtype=np.int32), SampleConfig(max_new_tokens=12))
    slot_decoder = decoder(LONG, slots=2)
    slot_decoder.start(short)
    slot_decoder.step()
    slot_decoder.start(long)
    before = short.new
    slot_decoder.step()
    assert 0 < long.read < 289, "the prompt is read in several chunks"
    assert short.new == before + 1
    found = {id(short): short.tokens, id(long): long.tokens}
    while slot_decoder.rows:
        slot_decoder.step()
    for row in (short, long):
        assert found[id(row)][len(row.prompt) :] == alone(LONG, row)


def test_a_prompt_that_begins_like_an_earlier_one_reads_only_the_rest():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 37, 30, dtype=np.int32)
    slot_decoder = decoder()
    run(slot_decoder, [Row(first, SampleConfig(max_new_tokens=4)), *make_rows(2)])
    read = slot_decoder.prompt_tokens_read
    again = Row(np.append(first[:25], [1, 2, 3]).astype(np.int32), SampleConfig(max_new_tokens=8, seed=2))
    assert run(slot_decoder, [again]) == [alone(MODEL, again)]
    assert slot_decoder.prompt_tokens_read - read == 2  # the last token is read by the decoding loop


def test_the_beginning_of_a_running_sequence_is_copied():
    rng = np.random.default_rng(0)
    system = rng.integers(0, 37, 150, dtype=np.int32)
    rows = [
        Row(np.append(system, [number, 5]).astype(np.int32), SampleConfig(max_new_tokens=10, seed=number))
        for number in range(3)
    ]
    slot_decoder = decoder(LONG)
    assert run(slot_decoder, rows) == [alone(LONG, row) for row in rows]
    # The others wait for the first chunk of 128, copy it, and read what is left.
    assert slot_decoder.prompt_tokens_read == 151 + 2 * (151 - 128)


def test_a_stopped_sequence_frees_its_slot_and_leaves_the_others_alone():
    rows = make_rows(3, temperature=0.9)
    rows = [dataclasses.replace(row, options=dataclasses.replace(row.options, max_new_tokens=20)) for row in rows]
    slot_decoder = decoder()
    for row in rows:
        slot_decoder.start(row)
    slot_decoder.step()
    slot_decoder.stop(rows[1])
    assert slot_decoder.free == 1
    [late] = make_rows(1, seed=9)
    slot_decoder.start(late)
    while slot_decoder.rows:
        slot_decoder.step()
    for row in (rows[0], rows[2], late):
        assert row.tokens[len(row.prompt) :] == alone(MODEL, row)


@pytest.mark.parametrize(
    ("prompts", "tokens", "shape"),
    [(1, 1, (1, 32)), (1, 32, (1, 32)), (2, 9, (4, 32)), (9, 32, (4, 32)), (1, 33, (1, 128)), (5, 400, (1, 128))],
)
def test_few_short_prompts_are_not_padded_to_many(prompts, tokens, shape):
    assert chunk_shape(prompts, tokens) == shape


def test_a_burst_takes_a_bounded_time_and_ends_with_a_sequence():
    assert burst_length(BURST_SECONDS / 8.5, [100, 50]) == 8
    assert burst_length(10 * BURST_SECONDS, [100, 50]) == 1
    assert burst_length(BURST_SECONDS / 8.5, [100, 5]) == 5
    assert burst_length(BURST_SECONDS / 8.5, [100, 3]) == 8, "so short a burst would cost more than it saves"
    assert burst_length(BURST_SECONDS / 8.5, [2, 3]) == 3
    assert burst_length(BURST_SECONDS / 1000, [10_000]) <= BUFFER


@pytest.mark.parametrize("model", [MODEL, dataclasses.replace(MODEL, n_layer=1, attention_sinks=2)])
def test_several_prompts_in_one_chunk_are_read_as_each_alone(model):
    rows = make_rows(3, longest=30, temperature=0)
    slot_decoder = decoder(model)
    assert run(slot_decoder, rows) == [alone(model, row) for row in rows]
    assert slot_decoder.prompt_tokens_read == sum(len(row.prompt) - 1 for row in rows)


@pytest.mark.parametrize("length", [1, 2, *sorted({size + 1 for _, size in CHUNKS}), 140])
def test_prompts_of_every_size_of_chunk(length):
    row = Row(np.random.default_rng(1).integers(0, 37, length, dtype=np.int32), SampleConfig(max_new_tokens=5))
    assert run(decoder(LONG, slots=2), [row]) == [alone(LONG, row)]


def test_log_probabilities_of_prompt_and_new_tokens_are_those_of_a_full_forward_pass():
    row = Row(
        np.random.default_rng(1).integers(0, 37, 150, dtype=np.int32),
        SampleConfig(max_new_tokens=6, logprobs=2),
        score_prompt=True,
    )
    slot_decoder, of_prompt, of_new = decoder(LONG), [], []
    slot_decoder.start(row)
    while slot_decoder.rows:
        for event in slot_decoder.step():
            if event.prompt_logprobs is not None:
                of_prompt.append(event.prompt_logprobs)
            if event.piece.logprobs is not None:
                of_new.append(event.piece.logprobs)
    tokens = np.array(row.tokens)
    x_1TD = hidden_states(LONG, make_params(LONG), tokens[None, :-1], jnp.arange(155)[None])
    expected = np.asarray(jax.nn.log_softmax(logits(LONG, make_params(LONG), x_1TD)))[0]
    found = np.concatenate([part.chosen_N for part in (*of_prompt, *of_new)])
    np.testing.assert_allclose(found, expected[np.arange(155), tokens[1:]], atol=3e-5)  # sums in another order
    ids = np.concatenate([part.ids_NK[:, :2] for part in (*of_prompt, *of_new)])
    np.testing.assert_array_equal(ids, np.argsort(-expected)[:, :2])


def test_a_prompt_may_be_scored_alone():
    row = Row(np.arange(20, dtype=np.int32), SampleConfig(logprobs=1), score_prompt=True, score_only=True)
    slot_decoder = decoder()
    slot_decoder.start(row)
    events = slot_decoder.step()
    assert [len(event.prompt_logprobs.chosen_N) for event in events if event.prompt_logprobs] == [19]
    assert events[-1].ended
    assert slot_decoder.free == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 60, {"max_new_tokens": 6}, "the prompt has 60 tokens, and 6 new ones do not fit"),
        ([], {}, "prompt 1 is empty"),
        ([99], {}, "contains token 99"),
        ([1], {"no_repeat_ngram": 2}, "no_repeat_ngram=2 is supported by gptjax sample only"),
        ([1], {"logprobs": 21}, "logprobs=21 must be at most 20"),
    ],
)
def test_what_cannot_be_decoded_is_refused(prompt, options, message):
    options = {"max_new_tokens": 2} | options
    slot_decoder = decoder()
    with pytest.raises(UserError, match=message):
        slot_decoder.start(Row(np.array(prompt, np.int32), SampleConfig(**options)))
    assert slot_decoder.free == 3


def test_few_programs_compile_whatever_comes():
    model = dataclasses.replace(MODEL, n_layer=1)
    before = slots_module.decode._cache_size(), slots_module._read_chunk._cache_size()
    run(decoder(model), make_rows(12, seed=3))
    after = slots_module.decode._cache_size(), slots_module._read_chunk._cache_size()
    assert after[0] - before[0] == 1
    assert after[1] - before[1] <= len(CHUNKS)


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        *((VARIANTS[name], "float32") for name in ("plain", "grouped heads")),
        *((VARIANTS["attention window"], dtype) for dtype in ("float32", "bfloat16")),
        *((dataclasses.replace(VARIANTS["plain"], positions=name), "float32") for name in ("rope", "alibi", "t5")),
    ],
    ids=["plain", "grouped heads", "attention window", "attention window, bfloat16", "rope", "alibi", "t5"],
)
def test_rows_with_lengths_of_their_own_are_rows_alone(model, dtype):
    """Rows at different places of the cache get the hidden states that each gets by itself."""
    params = layer_by_layer(model, init_params(model, jax.random.key(0)))
    tokens_BT = np.random.default_rng(0).integers(0, 37, (2, 12), dtype=np.int32)
    lengths = (2, 9)
    cache = init_cache(model, jnp.zeros(2, jnp.int32), 16, dtype, own_lengths=True)
    expected = []
    for row, length in enumerate(lengths):
        one = init_cache(model, jnp.zeros(1, jnp.int32), 16, dtype)
        _, one = extend(model, params, tokens_BT[row : row + 1, :length], one, "float32")
        cache = kv.replace_rows(cache, jnp.array([row]), one._replace(used=jnp.full(1, length)))
        expected.append(extend(model, params, tokens_BT[row : row + 1, length : length + 3], one, "float32")[0])
    next_BT = np.stack([tokens_BT[row, length : length + 3] for row, length in enumerate(lengths)])
    found, longer = extend(model, params, next_BT, cache, "float32")
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5)  # matmuls of other shapes
    assert longer.used.tolist() == [length + 3 for length in lengths]


def test_a_row_does_not_get_the_bias_of_the_one_before_it_in_its_slot():
    """The others have biases, so that the tables are read."""
    prompt = np.arange(5, dtype=np.int32)
    biased = {"logit_bias": ("7=30",), "max_new_tokens": 3, "temperature": 0}
    slot_decoder = decoder(slots=2)
    run(slot_decoder, [Row(prompt, SampleConfig(**biased)) for _ in range(2)])
    plain = Row(prompt, SampleConfig(max_new_tokens=8, temperature=0))
    found, other = run(slot_decoder, [plain, Row(prompt, SampleConfig(**biased | {"max_new_tokens": 9}))])
    assert found == alone(MODEL, plain) and found != other[:8]


def test_a_row_that_waits_for_its_prompt_has_no_token_to_be_penalised():
    options = {"temperature": 0, "ignore_end_of_text": True, "frequency_penalty": 2.0}
    first = Row(np.arange(5, dtype=np.int32), SampleConfig(max_new_tokens=30, **options))
    prompt = np.random.default_rng(0).integers(0, 37, 290, dtype=np.int32)
    second = Row(prompt, SampleConfig(max_new_tokens=20, **options))
    found = run(decoder(LONG), [first, second], lambda row: 2 if row is second else 0)
    assert found == [alone(LONG, first), alone(LONG, second)]


def test_contexts_slide_by_a_token_and_what_was_replaced_is_not_reused():
    model = dataclasses.replace(MODEL, n_layer=1, block_size=32, positions="rope")
    shared = {"temperature": 0, "ignore_end_of_text": True}
    long = Row(np.arange(7, dtype=np.int32), SampleConfig(max_new_tokens=200, **shared))
    short = Row(np.arange(3, 30, dtype=np.int32), SampleConfig(max_new_tokens=20, **shared))
    slot_decoder = decoder(model, 2)
    assert run(slot_decoder, [long, short]) == [alone(model, long), alone(model, short)]
    again = Row(np.array(long.tokens[:30], np.int32), SampleConfig(max_new_tokens=9, **shared))
    assert run(slot_decoder, [again]) == [alone(model, again)]
    stopped = Row(np.arange(7, dtype=np.int32), SampleConfig(max_new_tokens=400, **shared))
    slot_decoder.start(stopped)
    while stopped.read < slot_decoder._size - 5:
        slot_decoder._step_seconds = 1.0  # one token at a time
        slot_decoder.step()
    slot_decoder._step_seconds = 1e-6  # the longest burst, which writes over the first tokens
    slot_decoder.step(lambda: slot_decoder.stop(stopped))
    again = Row(np.array(stopped.tokens[:30], np.int32), SampleConfig(max_new_tokens=9, **shared))
    assert run(slot_decoder, [again]) == [alone(model, again)]
    with pytest.raises(UserError, match=r"the prompt has 33 tokens"):
        slot_decoder.start(Row(np.zeros(33, np.int32), SampleConfig(max_new_tokens=1)))
