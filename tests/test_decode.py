"""Decoding with a cache. Shape suffixes: B row, T position, D n_embd, V vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation import decode
from gptjax.generation.choose import choice_numbers, choice_rule, choose
from gptjax.generation.controls import History
from gptjax.generation.decode import DecodingModel, generate, prefilled, stream
from gptjax.generation.request import Request
from gptjax.generation.sample import sample_texts
from gptjax.generation.weights import decoding_weights, rounded_weights
from gptjax.model.block import Block
from gptjax.model.cache import init_cache
from gptjax.model.gpt import extend as extend_layers
from gptjax.model.gpt import logits
from gptjax.ops.projection import project
from gptjax.text.tokenizers.byte_pair import bpe_tokenizer_from_ranks
from gptjax.text.tokenizers.plain import ByteTokenizer, CharTokenizer
from tests.tiny import extend, hidden_states, init_params, layer_by_layer

MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=16, block_size=24, vocab_size=37)
VARIANTS = {
    "plain": MODEL,
    "grouped heads": ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, block_size=24, vocab_size=37),
    "untied, padded, no bias": ModelConfig(
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=24,
        vocab_size=37,
        vocab_multiple=64,
        tied_embeddings=False,
        bias=False,
    ),
    "attention window": ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=37, attention_window=5),
    "tied and padded": ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=24, vocab_size=37, vocab_multiple=64),
}
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top-k and top-p": {"temperature": 0.8, "top_k": 9, "top_p": 0.8},
    "top-p": {"top_p": 0.5},
}


@functools.cache
def make_params(model: ModelConfig) -> dict:
    """Weights spread so widely that logits differ clearly and a wrong cache shows."""
    params = init_params(model, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf + 0.1, params)


@functools.partial(jax.jit, static_argnums=(0, 4))
def next_token(model, params, context_T, last, rule, key, numbers):
    """The token after position `last`, from a whole forward pass."""
    T = context_T.shape[0]
    x_1TD = hidden_states(model, params, context_T[None], jnp.arange(T)[None])
    logits_1V = logits(model, params, jax.lax.dynamic_slice_in_dim(x_1TD, last, 1, axis=1))[:, 0]
    return choose(logits_1V, key[None], rule, numbers)[0]


def uncached(model, params, prompt, options, prompt_number=0, sample=0, end_of_text=None):
    """What `generate` does for one row, one full forward pass per token; slides as the documentation says."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(options.seed), prompt_number), sample)
    numbers = choice_numbers(options, 1)
    tokens, start, new = list(prompt), max(0, len(prompt) - model.block_size), []
    for number in range(options.max_new_tokens):
        if len(tokens) - start > model.block_size:
            start = len(tokens) - model.block_size // 2
        context = np.zeros(model.block_size, np.int32)
        context[: len(tokens) - start] = tokens[start:]
        token_key = jax.random.fold_in(key, number)
        last = len(tokens) - start - 1
        token = int(next_token(model, params, context, last, choice_rule(options), token_key, numbers))
        if token == end_of_text:
            break
        tokens.append(token)
        new.append(token)
    return new


def make_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 37, length) for length in lengths]


@pytest.mark.parametrize(
    ("variant", "sampling"),
    [
        *(("plain", sampling) for sampling in SAMPLING),
        *((variant, "greedy") for variant in VARIANTS if variant != "plain"),
    ],
)
def test_cached_decoding_chooses_the_tokens_of_full_forward_passes(variant, sampling):
    model, params = VARIANTS[variant], make_params(VARIANTS[variant])
    options = SampleConfig(max_new_tokens=15, num_samples=2, seed=5, **SAMPLING[sampling])
    prompts = make_prompts(1, 4, 9)
    samples = generate(model, params, prompts, options)
    for number, prompt in enumerate(prompts):
        for sample in range(2):
            expected = uncached(model, params, prompt, options, number, sample)
            assert samples[number][sample].tolist() == expected


@pytest.mark.parametrize("sampling", ["greedy", "plain"])
def test_sliding_follows_the_documented_rule(sampling):
    told = []
    options = SampleConfig(max_new_tokens=50, seed=2, **SAMPLING[sampling])
    prompts = make_prompts(3, 20, 24, 40)
    samples = generate(MODEL, make_params(MODEL), prompts, options, notify=told.append)
    for number, prompt in enumerate(prompts):
        assert samples[number][0].tolist() == uncached(MODEL, make_params(MODEL), prompt, options, number)
    assert len(told) == 2
    assert "prompt 4 has 40 tokens" in told[0]
    assert "slides to its last 12 tokens" in told[1]


def test_a_window_of_one_token_works():
    model = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=1, vocab_size=37)
    options = SampleConfig(max_new_tokens=5, temperature=0)
    [[sample]] = generate(model, make_params(model), make_prompts(3), options)
    assert len(sample) == 5


@pytest.mark.parametrize("sampling", ["greedy", "plain"])
def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(sampling):
    options = SampleConfig(max_new_tokens=40, num_samples=2, seed=9, **SAMPLING[sampling])
    one = SampleConfig(max_new_tokens=40, seed=9, **SAMPLING[sampling])
    first, second = make_prompts(5, 17)
    params = make_params(MODEL)
    together = generate(MODEL, params, [first, second], options)
    [[alone]] = generate(MODEL, params, [first], one)
    np.testing.assert_array_equal(together[0][0], alone)
    if sampling == "greedy":
        [[alone]] = generate(MODEL, params, [second], one)
        np.testing.assert_array_equal(together[1][0], alone)


def test_seeds_prompt_numbers_and_sample_numbers_give_different_samples():
    [prompt] = make_prompts(4)
    texts = {
        tuple(sample)
        for seed in (0, 2**32 - 1)
        for samples in generate(
            MODEL,
            make_params(MODEL),
            [prompt, prompt],
            SampleConfig(max_new_tokens=20, num_samples=3, seed=seed),
        )
        for sample in samples
    }
    assert len(texts) == 12


def test_rows_stop_at_end_of_text_each_for_itself():
    options = SampleConfig(max_new_tokens=60, num_samples=3, seed=4)
    prompts, params = make_prompts(2, 6), make_params(MODEL)
    samples = generate(MODEL, params, prompts, options, end_of_text=3)
    lengths = {len(sample) for row in samples for sample in row}
    assert len(lengths) > 2, "the test needs rows that stop at different places"
    for number, prompt in enumerate(prompts):
        for sample in range(3):
            expected = uncached(MODEL, params, prompt, options, number, sample, end_of_text=3)
            assert samples[number][sample].tolist() == expected


def test_the_loop_ends_when_all_rows_have_stopped():
    [prompt] = make_prompts(4)
    options = SampleConfig(max_new_tokens=10_000, temperature=0)
    endless = generate(MODEL, make_params(MODEL), [prompt], SampleConfig(max_new_tokens=3, temperature=0))
    stop = int(endless[0][0][-1])
    first = endless[0][0].tolist().index(stop)
    pieces = list(stream(MODEL, make_params(MODEL), Request([prompt], options, stop)))
    assert len(pieces) == 1
    assert pieces[0][0].tokens_N.tolist() == endless[0][0][:first].tolist()


def test_end_of_text_can_be_ignored():
    [prompt] = make_prompts(4)
    options = SampleConfig(max_new_tokens=30, temperature=0, ignore_end_of_text=True)
    [[sample]] = generate(MODEL, make_params(MODEL), [prompt], options, end_of_text=3)
    [[without]] = generate(MODEL, make_params(MODEL), [prompt], options)
    np.testing.assert_array_equal(sample, without)
    assert len(sample) == 30


@pytest.mark.parametrize("piece_length", [1, 7])
def test_streamed_pieces_join_to_what_generate_returns(piece_length):
    options = SampleConfig(max_new_tokens=40, num_samples=2, seed=6)
    prompts, params = make_prompts(3, 11), make_params(MODEL)
    whole = generate(MODEL, params, prompts, options, end_of_text=3)
    pieces = list(stream(MODEL, params, Request(prompts, options, 3), piece_length=piece_length))
    joined = [np.concatenate([piece.tokens_N for piece in row]) for row in zip(*pieces, strict=True)]
    assert [row.tolist() for row in joined] == [sample.tolist() for samples in whole for sample in samples]


@pytest.mark.parametrize("variant", ["plain", "attention window"])
def test_a_large_cache_grows_as_it_fills_and_changes_no_token(monkeypatch, variant):
    model = VARIANTS[variant]
    prompts = [np.arange(5), np.arange(9) + 20]
    options = SampleConfig(num_samples=2, max_new_tokens=40, seed=3, top_k=9)  # slides once
    expected = generate(model, make_params(model), prompts, options)
    sizes = []
    grow = decode._grown
    monkeypatch.setattr(decode, "_grown", lambda *args: (sizes.append(args[2]), grow(*args))[1])
    monkeypatch.setattr(decode, "LARGE", 0)
    monkeypatch.setattr(decode, "SLOTS_MULTIPLE", 4)
    grown = generate(model, make_params(model), prompts, options)
    assert sizes == [32]
    jax.tree.map(np.testing.assert_array_equal, grown, expected)


def test_short_rows_go_on_after_the_longest_has_stopped(monkeypatch):
    monkeypatch.setattr(decode, "SLOTS_MULTIPLE", 1)
    params, prompts = make_params(MODEL), [np.arange(20), np.arange(2) + 30]
    options = SampleConfig(num_samples=1, max_new_tokens=22, seed=5)
    [[long], [short]] = generate(MODEL, params, prompts, options)
    stop = next(int(token) for token in long[:5] if token not in short)
    [[stopped], [went_on]] = generate(MODEL, params, prompts, options, end_of_text=stop)
    assert len(stopped) < 5
    np.testing.assert_array_equal(went_on, short)


def test_lengths_seeds_and_heat_share_one_compiled_program():
    model = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=37)
    params = make_params(model)
    before = decode.decode._cache_size()
    for length, new, seed, temperature in ((3, 20, 0, 0.7), (14, 31, 1, 1.3), (16, 5, 2, 0.9)):
        options = SampleConfig(max_new_tokens=new, seed=seed, temperature=temperature, top_p=0.9)
        generate(model, params, make_prompts(length), options)
    assert decode.decode._cache_size() == before + 1


def test_the_compiled_loop_does_not_copy_the_cache():
    text = _compiled_decode(MODEL)
    shape = "f32[3,4,64,4]"  # [B, G, S, C]
    assert shape in text
    copies = [line for line in text.splitlines() if f" = {shape}" in line and " copy(" in line]
    assert not copies


def _compiled_decode(model):
    from gptjax.model.cache import init_cache

    rows = 3
    weights = decoding_weights(model, make_params(model), "float32", one_row=False)
    cache = init_cache(model, jnp.zeros(rows, jnp.int32), 64, "float32")
    keys = jax.random.split(jax.random.key(0), rows)
    arguments = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), keys, jnp.full(rows, 0), jnp.int32(9)
    controls = Request([], SampleConfig(temperature=0)).controls(model.vocab_size, rows)
    decoding = DecodingModel(model, weights, "float32", "float32")
    lowered = decode.decode.lower(decoding, controls, cache, History(), *arguments)
    return lowered.compile().as_text()


@pytest.mark.parametrize("options", [{"compute_dtype": "bfloat16"}, {"quantize": "int8"}], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("lengths", [(9,), (4, 9, 2)], ids=["one row", "rows"])
def test_rounded_weights_give_nearly_the_same_logits(options, lengths):
    """Read off the probabilities that sampling uses: the readout of the same context, in both precisions."""
    model, params = MODEL, make_params(MODEL)
    dtype = options.get("quantize") or options["compute_dtype"]
    exact, rounded = (last_logits(model, params, precision, lengths) for precision in ("float32", dtype))
    assert not np.array_equal(exact, rounded)
    # Both round weights by up to 1/256, bfloat16 activations too; a wrong layout or scale would be off by all of it.
    np.testing.assert_allclose(rounded, exact, atol=0.08 * np.abs(exact).max())


def last_logits(model, params, dtype, lengths):
    weights = decoding_weights(model, params, dtype, one_row=len(lengths) == 1)
    contexts = [np.append(prompt, 0) for prompt in make_prompts(*lengths)]  # the last token is left for the loop
    cache = prefilled(DecodingModel(model, weights, "float32", "float32"), contexts, 64)
    x_B1D, _ = extend(model, weights.params, jnp.zeros((len(lengths), 1), jnp.int32), cache, "float32")
    return np.asarray(project(x_B1D, weights.readout)[:, 0])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_evaluation_has_the_rounded_weights_of_decoding(dtype):
    model, params = VARIANTS["tied and padded"], make_params(VARIANTS["tied and padded"])
    [context] = [np.append(prompt, 0) for prompt in make_prompts(9)]
    rounded, weights = rounded_weights(model, params, dtype)
    x_1TD = hidden_states(rounded, weights, context[None], np.arange(10)[None])
    expected = logits(rounded, weights, x_1TD)[0, -1]
    # int8 activations are rounded to 16 bits
    np.testing.assert_allclose(last_logits(model, params, dtype, (9,))[0], expected, atol=2e-3, rtol=1e-4)
    exact = logits(model, params, hidden_states(model, params, context[None], np.arange(10)[None]))[0, -1]
    assert np.abs(exact - expected).max() > 0.02


@pytest.mark.parametrize(
    "options",
    [{"compute_dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}],
    ids=["bfloat16", "int8", "int4"],
)
def test_rounded_weights_decode(options):
    samples = generate(
        MODEL, make_params(MODEL), make_prompts(4, 9), SampleConfig(max_new_tokens=40, seed=1, **options)
    )
    assert all(len(row[0]) == 40 and row[0].max() < 37 for row in samples)


def test_equal_layers_are_traced_once(monkeypatch):
    """Tracing took most of the time until the first token of a deep model."""
    kinds = ("local", "local", "full")
    model = ModelConfig(
        **{"n_layer": 6, "n_head": 2, "n_embd": 16, "block_size": 20, "vocab_size": 37},
        attention_window=5,
        attention_pattern=kinds,
    )
    traced, call = [], Block.__call__
    monkeypatch.setattr(Block, "__call__", lambda self, *inputs: traced.append(inputs[3]) or call(self, *inputs))
    params = jax.eval_shape(lambda key: layer_by_layer(model, init_params(model, key)), jax.random.key(0))
    cache = jax.eval_shape(lambda: init_cache(model, jnp.zeros(3, jnp.int32), 20, "float32"))
    jax.eval_shape(
        lambda p, c, tokens: extend_layers(model, p, tokens, c, "float32"), params, cache, jnp.zeros((3, 2), int)
    )
    assert sorted(traced) == sorted(set(map(model.layer_kind, range(6)))) and len(traced) == 2


def test_params_that_lie_on_several_devices_decode_the_same():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.device_put(make_params(MODEL), jax.NamedSharding(mesh, jax.P()))
    options = SampleConfig(max_new_tokens=30, seed=3)
    prompts = make_prompts(2, 7)
    ours = generate(MODEL, everywhere, prompts, options)
    expected = generate(MODEL, make_params(MODEL), prompts, options)
    assert [[s.tolist() for s in row] for row in ours] == [[s.tolist() for s in row] for row in expected]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([np.array([], int)], {}, "prompt 1 is empty"),
        ([np.array([1]), np.array([1, 37])], {}, "prompt 2 contains token 37, which is outside model.vocab_size=37"),
        ([np.array([-1])], {}, "prompt 1 contains token -1"),
        ([np.array([1])], {"top_k": 38}, "top_k=38 must be at most model.vocab_size=37"),
        ([np.array([1])], {"logprobs": 38}, "logprobs=38 must be at most model.vocab_size=37"),
        ([np.array([1])], {"logit_bias": ("37=1",)}, "logit_bias: token 37 is outside model.vocab_size=37"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(prompts, options, message):
    with pytest.raises(UserError, match=message):
        stream(MODEL, {}, Request(prompts, SampleConfig(**options)))


# --- texts ------------------------------------------------------------------------------------------------------

BYTES = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=257)


def sample(prompts, on_text=None, **options):
    return sample_texts(BYTES, make_params(BYTES), ByteTokenizer(), prompts, SampleConfig(**options), on_text=on_text)


def test_texts_are_the_decoded_tokens():
    texts = sample(["né", "a"], max_new_tokens=40, num_samples=2, seed=1)
    prompts = [ByteTokenizer().encode("né"), ByteTokenizer().encode("a")]
    options = SampleConfig(max_new_tokens=40, num_samples=2, seed=1)
    ids = generate(BYTES, make_params(BYTES), prompts, options, end_of_text=256)
    assert texts == [[ByteTokenizer().decode(row) for row in samples] for samples in ids]


def test_pieces_of_text_join_to_the_texts():
    pieces: dict = {}

    def take(prompt, number, piece):
        pieces[prompt, number] = pieces.get((prompt, number), "") + piece

    texts = sample(["x", "yz"], take, max_new_tokens=40, num_samples=2)
    assert [[pieces[prompt, number] for number in range(2)] for prompt in range(2)] == texts


def prompts_of_stream(monkeypatch):
    seen = []

    def stand_in(_config, _params, request, **_):
        seen.extend(request.prompts)
        return iter(())

    monkeypatch.setattr("gptjax.generation.sample.stream", stand_in)
    return seen


def test_end_of_text_in_a_prompt_is_plain_text_unless_allowed(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "gptjax.generation.sample.stream", lambda *args, **kwargs: seen.extend(args[2].prompts) or iter(())
    )
    sample(["a<|endoftext|>b"])
    sample(["a<|endoftext|>b", "<|endoftext|>"], allow_special=True)
    assert seen[0].tolist() == list(b"a<|endoftext|>b")
    assert [ids.tolist() for ids in seen[1:]] == [[97, 256, 98], [256]]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt 1 is empty"),
        ("né", {}, "'é'"),
        ("<|endoftext|>", {"allow_special": True}, "has no such token"),
    ],
)
def test_a_prompt_that_cannot_be_encoded_is_refused(prompt, options, message):
    tokenizer = CharTokenizer("<>adefnotx|", has_end_of_text=False)
    with pytest.raises(UserError, match=message):
        sample_texts(BYTES, {}, tokenizer, [prompt], SampleConfig(**options))


def test_ids_that_only_the_model_has_are_never_chosen():
    params = make_params(BYTES)
    params["embed"]["tokens"] = params["embed"]["tokens"].at[256].mul(100.0)  # likely, where it may be chosen
    tokenizer = bpe_tokenizer_from_ranks({bytes([i]): i for i in range(256)}, ".", {})
    assert tokenizer.vocab_size == 256 < BYTES.vocab_size
    options = SampleConfig(max_new_tokens=30)
    [[ids]] = generate(BYTES, params, [tokenizer.encode("a")], options)
    assert (ids == 256).any(), "the test needs a model that chooses the id"
    [[text]] = sample_texts(BYTES, params, tokenizer, ["a"], options)
    assert text


def test_a_prompt_at_the_start_of_a_document_begins_with_end_of_text(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "gptjax.generation.sample.stream", lambda *args, **kwargs: seen.extend(args[2].prompts) or iter(())
    )
    sample_texts(BYTES, {}, ByteTokenizer(), ["ab"], SampleConfig(), at_start=True)
    sample_texts(BYTES, {}, ByteTokenizer(), ["ab"], SampleConfig())
    assert [ids.tolist() for ids in seen] == [[256, 97, 98], [97, 98]]
