"""What each objective may see: the batches, by their definitions, and the gradient of the loss at each position."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.arranged import ArrangedWindows
from gptjax.batches.objectives import OBJECTIVES, vocabulary_of
from gptjax.batches.pretraining import PrefixBatch
from gptjax.config.objective import FILL, MASK, MODES, NEXT, SPANS, SPECIAL_TOKENS, ObjectiveConfig
from gptjax.errors import UserError
from gptjax.model.gpt import Compute, apply_blocks, embed_tokens, final_norm
from gptjax.model.loss import inputs_of, loss_options, token_loss
from gptjax.model.multi_token import multi_token_loss, targets_ahead
from gptjax.text.tokenizer import tokenizer_from_json
from gptjax.text.tokenizers.base import tokenizer_to_json
from gptjax.text.tokenizers.extended import with_special_tokens
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.test_batches import END, LENGTHS, make_split
from tests.tiny import CONFIG, MODEL, init_all, init_params, make_batch, replace

KINDS = sorted(OBJECTIVES)
NAMES = (*FILL, MASK, *SPANS, *MODES)
TEXT = 500  # ids below are text; token i of the corpus is i, so that each token names its place
VOCABULARY = dataclasses.replace(
    vocabulary_of(with_special_tokens(ByteTokenizer(), NAMES), NAMES),
    text_tokens=TEXT,
    end_of_text=END,
    special={name: TEXT + number for number, name in enumerate(NAMES)},
    joins=(np.arange(TEXT) % 3 > 0, np.arange(TEXT) % 3 < 2),  # words are ids 3k, 3k + 1, 3k + 2
)
SPECIAL = VOCABULARY.special


def windows(kind, lengths=(200, 90, 150), T=40, seed=0, **options) -> ArrangedWindows:
    options = {"fill_rate": 1.0} | options if kind == "fill_in_the_middle" else options
    return ArrangedWindows(make_split(lengths), T, seed, False, ObjectiveConfig(kind=kind, **options), VOCABULARY)


def arranged(kind, tokens, seed=0, **options):
    config = ObjectiveConfig(kind=kind, **options)
    return OBJECTIVES[kind](config, VOCABULARY, np.asarray(tokens, np.int32), np.random.default_rng(seed))


def visible(batch, row, bidirectional):
    """Which inputs the output at each position may depend on, by the rules of attention."""
    T = batch.inputs.shape[1]
    may = np.ones((T, T), bool) if bidirectional else np.tril(np.ones((T, T), bool))
    if isinstance(batch, PrefixBatch):
        may |= batch.ahead[row][None]
    return may & (batch.segments[row][:, None] == batch.segments[row][None])


@pytest.mark.parametrize("kind", KINDS)
def test_no_target_is_among_the_inputs_that_its_prediction_sees(kind):
    kept = total = 0
    for step in range(20):
        batch = windows(kind).batch(step, 2)
        for row in range(2):
            may = visible(batch, row, kind == "masked")
            for t in np.flatnonzero(batch.targets[row] > END):
                target, seen = batch.targets[row, t], batch.inputs[row, may[t]]
                if target >= TEXT and target - TEXT >= len(FILL):  # a sentinel also marks its place in the text
                    continue
                total += 1
                kept += target in seen
    assert total > 100
    if kind == "masked":  # a tenth of the chosen tokens stay, and a random token may be the right one
        assert 0.03 < kept / total < 0.2
    else:
        assert not kept


SMALL = dataclasses.replace(MODEL, vocab_size=TEXT + len(NAMES), block_size=24, n_embd=8, n_layer=2)


def gradients(model, params, batch, losses):
    """The size of the gradient of each position's loss by each input embedding; `losses` is a function of states."""
    inputs, T = inputs_of(model, batch), batch.inputs.shape[1]

    @jax.jit
    def sizes(params):
        x_1TD = embed_tokens(model, params, batch.inputs, batch.positions)

        def of_embeddings(x_1TD):
            y_1TD, _ = apply_blocks(model, params, x_1TD, inputs, compute=Compute(unroll=1))
            y_1TD = final_norm(model, params, y_1TD)
            return jax.lax.map(lambda t: losses(params, y_1TD, jnp.arange(T)[None] == t), jnp.arange(T))

        return jnp.sum(jnp.abs(jax.jacrev(of_embeddings)(x_1TD)), axis=(1, 3))

    return np.asarray(sizes(params))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_at_a_position_depends_on_what_the_objective_shows_it_and_on_nothing_else(kind):
    model = dataclasses.replace(SMALL, bidirectional=kind == "masked")
    batch = windows(kind, (30, 9, 60), 24, seed=3).batch(0, 1)

    def losses(params, y_1TD, here_1T):
        one = batch._replace(targets=jnp.where(here_1T, batch.targets, -1))
        return token_loss(model, loss_options(model), params, y_1TD, one).objective

    sizes = gradients(model, init_params(model, jax.random.key(0)), batch, losses)
    may = visible(batch, 0, kind == "masked")
    has_target = batch.targets[0] >= 0
    np.testing.assert_array_equal(sizes[~has_target], 0)
    assert (sizes[has_target] > 0).tolist() == may[has_target].tolist()


def test_tokens_ahead_are_predicted_without_them():
    config = replace(CONFIG, model={"block_size": 24}, task={"objective": ObjectiveConfig(kind="multi_token", ahead=3)})
    model, params = config.model, init_all(config, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[0, :1], make_batch(model=model, batch_size=2))
    of_heads = multi_token_loss(model, loss_options(model))

    def losses(params, y_1TD, here_1T):
        """The loss of all heads whose next-token target is here: that of the token two ahead is at the next place."""
        return of_heads(params, y_1TD, batch._replace(targets=jnp.where(here_1T, batch.targets, -1))).objective

    sizes = gradients(model, params, batch, losses)
    # The target of position t is predicted by the decoder at t, and by heads at t - 1 and t - 2: none sees past t.
    same = batch.segments[0][:, None] == batch.segments[0][None]
    expected = np.tril(np.ones((24, 24), bool)) & same & (batch.targets[0] >= 0)[:, None]
    assert (sizes > 0).tolist() == expected.tolist()


def test_each_head_has_the_target_so_many_tokens_ahead():
    batch = jax.tree.map(lambda x: x[0], make_batch(batch_size=4))
    T = batch.inputs.shape[1]
    for distance in (1, 3):
        found = np.asarray(targets_ahead(batch, distance))
        for b in range(4):
            for t in range(T):
                inside = t + distance < T and batch.segments[b, t + distance] == batch.segments[b, t]
                assert found[b, t] == (batch.targets[b, t + distance] if inside else -1)
    config = replace(CONFIG, task={"objective": ObjectiveConfig(kind="multi_token", ahead=3)})
    params, x_BTD = init_all(config, jax.random.key(0)), jax.random.normal(jax.random.key(1), (4, T, MODEL.n_embd))
    options = loss_options(MODEL)
    with_heads, alone = (
        jax.jit(multi_token_loss(MODEL, options))(params, x_BTD, batch),
        jax.jit(token_loss, static_argnums=(0, 1))(MODEL, options, params, x_BTD, batch),
    )
    assert float(with_heads.nll) == float(alone.nll) and float(with_heads.count) == float(alone.count)
    assert set(with_heads.extras) == {"loss_2_ahead", "loss_3_ahead"}
    counts = [float((targets_ahead(batch, d) >= 0).sum()) for d in (1, 2)]
    means = [float(with_heads.extras[f"loss_{n}_ahead"] / alone.count) for n in (2, 3)]
    assert float(with_heads.objective) == pytest.approx(float(alone.nll) + np.dot(means, counts), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_functions_of_seed_and_step(kind):
    one, again, other = windows(kind), windows(kind), windows(kind, seed=1)
    again.batch(0, 4)
    whole = one.batch(3, 4)
    for x, y in zip(whole, again.batch(3, 4, np.array([1, 2])), strict=True):
        np.testing.assert_array_equal(x[1:3], y)
    assert not np.array_equal(whole.inputs, other.batch(3, 4).inputs)
    assert not np.array_equal(whole.inputs, one.batch(4, 4).inputs)
    first, second = (list(windows(kind).evaluation(3, 2)) for _ in range(2))
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)
    assert (first[-1].targets[1] == -1).all() and len(first) == 2


@pytest.mark.parametrize("lengths", [LENGTHS, [3] * 40, [1] * 30, [500]], ids=str)
@pytest.mark.parametrize("end_of_text", [END, None])
@pytest.mark.parametrize("kind", KINDS)
def test_any_documents_fit(kind, end_of_text, lengths):
    split = make_split(lengths, end_of_text)
    vocabulary = dataclasses.replace(VOCABULARY, end_of_text=end_of_text)
    found = ArrangedWindows(split, 24, 0, False, ObjectiveConfig(kind=kind), vocabulary)
    for batch in (found.batch(0, 4), *found.evaluation(0, 4)):
        assert batch.inputs.shape == batch.targets.shape == (4, 24)
        assert batch.positions.min() >= 0 and batch.positions.max() < 24
        assert (np.diff(batch.segments, axis=1) >= 0).all()
    assert isinstance(found.note(), str)


def test_backward_is_the_document_reversed():
    batch = windows("backward", (10, 6), T=16).batch(0, 1)
    stream = make_split((10, 6)).slice(0, 17)
    shown = [batch.inputs[0][batch.segments[0] == s].tolist() for s in (0, 1)]
    assert shown == [stream[1:11][::-1].tolist(), stream[11:17][::-1].tolist()]
    assert batch.targets[0][batch.segments[0] == 0].tolist() == stream[0:10][::-1].tolist()


def test_a_prefix_has_every_length_and_no_target():
    found = [arranged("prefix", np.arange(1, 7), seed) for seed in range(100)]
    assert {one.prefix for one in found} == {1, 2, 3, 4, 5}
    for one in found:
        assert (one.targets >= 0).tolist() == [t >= one.prefix - 1 for t in range(5)]


@pytest.mark.parametrize("suffix_first", [0.0, 1.0])
def test_the_middle_fills_what_prefix_and_suffix_leave(suffix_first):
    text = list(range(1, 20))
    for seed in range(30):
        one = arranged("fill_in_the_middle", [END, *text, END], seed, fill_rate=1.0, suffix_first=suffix_first)
        tokens = [*one.inputs.tolist(), int(one.targets[-1])]
        pre, suf, mid = (tokens.index(SPECIAL[name]) for name in FILL)
        assert tokens[0] == tokens[-1] == END and pre == 1
        if suffix_first:  # PRE SUF suffix MID prefix middle
            assert suf == 2 and tokens[mid + 1 : -1] + tokens[suf + 1 : mid] == text
        else:
            assert tokens[pre + 1 : suf] + tokens[mid + 1 : -1] + tokens[suf + 1 : mid] == text
        assert (one.targets >= 0).all()


def test_the_rates_of_filling_are_those_asked_for():
    found = [arranged("fill_in_the_middle", range(1, 20), s, fill_rate=0.3, suffix_first=0.8) for s in range(500)]
    moved = [one for one in found if SPECIAL[FILL[0]] in one.inputs]
    assert len(moved) / 500 == pytest.approx(0.3, abs=0.07)
    together = [one for one in moved if one.inputs.tolist().index(SPECIAL[FILL[1]]) == 1]
    assert len(together) / len(moved) == pytest.approx(0.8, abs=0.12)


def test_masked_tokens_are_replaced_as_in_bert():
    tokens = np.arange(1, 401)
    found = [arranged("masked", tokens, seed, rate=0.2) for seed in range(40)]
    for one in found:
        assert (one.targets >= 0).sum() == 80 and one.targets[0] == -1
        np.testing.assert_array_equal(one.inputs[one.targets < 0], tokens[one.targets < 0])
    inputs, targets = (np.concatenate([getattr(one, name) for one in found]) for name in ("inputs", "targets"))
    chosen = targets >= 0
    assert np.mean(inputs[chosen] == SPECIAL[MASK]) == pytest.approx(0.8, abs=0.03)
    assert np.mean(inputs[chosen] == targets[chosen]) == pytest.approx(0.1, abs=0.02)


def test_the_first_position_says_whether_the_second_part_follows():
    names = (MASK, *NEXT)
    special = {name: 500 + n for n, name in enumerate(names)}
    vocabulary = dataclasses.replace(VOCABULARY, special=special)
    split = make_split([200, 150, 120])
    config = ObjectiveConfig(kind="masked", rate=0.01, next_sentence=True)
    windows = ArrangedWindows(split, 64, 0, False, config, vocabulary)
    end, follows, total = vocabulary.end_of_text, 0, 0
    for step in range(30):
        batch = windows.batch(step, 4)
        for inputs, targets, segments in zip(batch.inputs, batch.targets, batch.segments, strict=True):
            for segment in np.unique(segments):
                here = segments == segment
                if targets[here][0] < 0:
                    continue
                known = np.where(targets[here] >= 0, targets[here], inputs[here])
                known[0] = inputs[here][0]
                cut = 1 + np.flatnonzero(known[1:] == end)[0]
                answer = {special[NEXT[0]]: True, special[NEXT[1]]: False}[int(targets[here][0])]
                continues = known[cut + 1] == known[cut - 1] + 1  # tokens of a document are numbered in order
                assert continues == answer or not answer  # by chance another place may follow too
                follows, total = follows + answer, total + 1
    assert total > 60 and 0.35 < follows / total < 0.65


def test_whole_words_are_masked_together():
    tokens = np.arange(3, 303)
    one = arranged("masked", tokens, rate=0.2, whole_words=True)
    words = {int(token) // 3 for token in one.targets[one.targets >= 0]}
    assert {3 * word + i for word in words for i in range(3)} - {3} == set(one.targets[one.targets >= 0].tolist())
    apart = arranged("masked", tokens, rate=0.2)
    assert len({int(token) // 3 for token in apart.targets[apart.targets >= 0]}) > 1.5 * len(words)


def test_words_end_where_the_text_has_no_letter():
    vocabulary = vocabulary_of(ByteTokenizer(), ())
    begins, ends = vocabulary.joins
    assert begins[ord("a")] and ends[ord("z")] and begins[0xC3] and not begins[ord(" ")] and not ends[ord(".")]
    assert not begins[ByteTokenizer().end_of_text]


def test_permuted_tokens_are_predicted_once_each_at_their_positions():
    tokens = np.arange(100, 140)
    one = arranged("permutation", tokens, rate=0.25)
    predicts = one.targets >= 0
    assert predicts.sum() == 10 and one.prefix == 0
    assert (one.inputs[predicts] == SPECIAL[MASK]).all()
    np.testing.assert_array_equal(one.targets[predicts], 100 + one.positions[predicts])
    np.testing.assert_array_equal(one.inputs[~predicts], 100 + one.positions[~predicts])
    last = one.targets[predicts][-1]
    assert sorted([*one.inputs[~predicts].tolist(), int(last)]) == tokens.tolist()
    assert one.positions[:30].tolist() != sorted(one.positions[:30])


@pytest.mark.parametrize("kind", ["span_corruption", "ul2"])
def test_spans_put_back_are_the_text(kind):
    tokens = list(range(1, 61))
    modes = set()
    for seed in range(60):
        one = arranged(kind, tokens, seed)
        known, rest = one.inputs[: one.prefix].tolist(), [*one.inputs[one.prefix :].tolist(), int(one.targets[-1])]
        assert (one.targets >= 0).sum() == len(rest)
        if kind == "ul2":
            modes.add(known.pop(0))
        if SPECIAL[MODES[2]] in one.inputs:  # the rest follows
            assert known + rest == tokens and len(rest) == 15
            continue
        sentinels = [token for token in rest if token >= TEXT]
        assert sentinels == [SPECIAL[name] for name in SPANS[: len(sentinels)]] and rest[-1] == sentinels[-1]
        for sentinel, following in itertools.pairwise(sentinels):
            span = rest[rest.index(sentinel) + 1 : rest.index(following)]
            assert span
            at = known.index(sentinel)
            known[at : at + 1] = span
        assert known == tokens
    assert modes == ({SPECIAL[name] for name in MODES} if kind == "ul2" else set())


def test_spans_have_the_rate_and_length_asked_for():
    def removed(**options):
        one = arranged("span_corruption", range(1, 202), **options)
        targets = one.targets[one.targets >= 0]
        return (targets < TEXT).sum(), (targets >= TEXT).sum() - 1

    assert removed() == (30, 10)
    assert removed(rate=0.3) == (60, 20)
    assert removed(span_length=6.0) == (30, 5)


def test_a_window_holds_as_much_text_as_fits():
    found = windows("span_corruption", (5000,), T=128)
    assert (found.batch(0, 8).segments == 0).mean() > 0.97 and not found.note()
    assert "do not fit" in windows("span_corruption", [6] * 200, T=64).note()


def test_special_tokens_are_tokens_that_no_text_encodes_to():
    tokenizer = with_special_tokens(ByteTokenizer(), (MASK, "<|x|>"))
    assert tokenizer.vocab_size == 259 and tokenizer.special_tokens.items() >= {MASK: 257, "<|x|>": 258}.items()
    assert tokenizer.encode(MASK).max() < 256 and tokenizer.end_of_text == 256
    assert tokenizer.decode([104, 257, 105, 106, 258]) == "h<|mask|>ij<|x|>"
    assert with_special_tokens(tokenizer, (MASK,)) is tokenizer
    again = tokenizer_from_json(tokenizer_to_json(tokenizer), "x")
    assert again.fingerprint == tokenizer.fingerprint != ByteTokenizer().fingerprint
    assert again.special_tokens == tokenizer.special_tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "masked", "rate": 0.0}, "rate=0.0 leaves no target"),
        ({"kind": "span_corruption", "span_length": 0.5}, "span_length=0.5 must be at least 1"),
        ({"kind": "multi_token", "ahead": 1}, "ahead=1 must be at least 2"),
        ({"kind": "fill_in_the_middle", "fill_rate": 1.5}, r"fill_rate=1.5 must lie in \[0, 1\]"),
        ({"kind": "prefix", "rate": 0.3}, "rate=0.3 has no effect without"),
    ],
)
def test_wrong_options_are_named(values, message):
    with pytest.raises(UserError, match=message):
        ObjectiveConfig(**values)


def test_a_window_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r"model.block_size=6 is too short for task.objective.kind=fill_in_the_middle"):
        windows("fill_in_the_middle", T=6).batch(0, 1)
    assert set(SPECIAL_TOKENS) <= set(OBJECTIVES)
