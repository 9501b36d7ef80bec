import itertools

import numpy as np
import pytest

from gptjax.batches.permutation import draw_keys, permute
from gptjax.batches.pretraining import MAKERS, Batch, PackedWindows, evaluation_batches
from gptjax.errors import UserError
from gptjax.tasks.pretrain import KIND
from gptjax.tasks.task import Source
from gptjax.text.packing import pack_best_fit
from gptjax.text.shards import Dataset, TokenSplit
from gptjax.text.tokenizers.plain import ByteTokenizer
from gptjax.training.step import compute_options
from tests.tiny import CONFIG, replace

END = 0


def make_split(lengths, end_of_text: int | None = END, shards=3) -> TokenSplit:
    """A stream in which token i of the corpus is i, except where end-of-text stands."""
    starts = np.cumsum([0, *lengths])
    tokens = np.arange(1, starts[-1] + 1)
    if end_of_text is not None:
        tokens[starts[:-1]] = end_of_text
        tokens = np.append(tokens, end_of_text)
    cuts = np.linspace(0, len(tokens), shards + 1).astype(int)
    pieces = list(itertools.pairwise(cuts))
    return TokenSplit(
        tokens=tuple(tokens[a:b].astype(np.uint16) for a, b in pieces),
        documents=tuple((starts[:-1][(starts[:-1] >= a) & (starts[:-1] < b)] - a).astype(np.uint64) for a, b in pieces),
        n_bytes=int(starts[-1]),
        end_of_text=end_of_text,
    )


def windows(split, block_size=8, seed=0, attend_across_documents=False) -> PackedWindows:
    return PackedWindows(split, block_size, seed, attend_across_documents)


LENGTHS = [5, 1, 30, 8, 8, 2, 3, 17, 40, 1, 1, 1, 20]


def equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def slow_row(split: TokenSplit, start: int, T: int, across: bool) -> Batch:
    """The definition, one token at a time."""
    stream = split.slice(0, split.n_tokens).tolist()
    starts = set(split.document_starts(0, split.n_tokens).tolist())
    inputs, targets, segments, positions = [], [], [], []
    segment = position = 0
    for t in range(start, start + T):
        if t > start and t in starts and not across:
            segment, position = segment + 1, 0
        inputs.append(stream[t] if t < len(stream) else 0)
        target = stream[t + 1] if t + 1 < len(stream) else -1
        if split.end_of_text is None and t + 1 in starts and not across:
            target = -1
        targets.append(target)
        segments.append(segment)
        positions.append(position)
        position += 1
    inputs, targets, segments, positions = (np.array(x, np.int32) for x in (inputs, targets, segments, positions))
    return Batch(inputs, targets, None if across or split.n_documents == 1 else segments, positions)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("end_of_text", [END, None])
@pytest.mark.parametrize("lengths", [LENGTHS, [50]], ids=["several", "one"])
def test_rows_equal_the_definition_token_by_token(across, end_of_text, lengths):
    split = make_split(lengths, end_of_text)
    packed = windows(split, attend_across_documents=across)
    for index in range(3 * packed.windows_per_epoch):
        row = packed.row(index)
        assert all(array.dtype == np.int32 and array.shape == (8,) for array in row if array is not None)
        # Tokens are their own places in the stream, so the first that is no end-of-text tells where it begins.
        t = int(np.argmax(row.inputs != END))
        assert equal(row, slow_row(split, int(row.inputs[t]) - 1 - t, 8, across))


def test_end_of_text_starts_its_segment_and_is_a_target_of_the_one_before():
    row = next(iter(evaluation_batches(make_split([3, 4]), 8, 0, 1, False)))
    assert row.inputs[0].tolist() == [END, 2, 3, END, 5, 6, 7, END]
    assert row.targets[0].tolist() == [2, 3, END, 5, 6, 7, END, -1]
    assert row.segments[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert row.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_every_window_of_an_epoch_comes_once_and_epochs_differ():
    packed = windows(make_split([1000]), block_size=7)
    n = packed.windows_per_epoch
    orders = []
    for epoch in range(4):
        batch = packed.batch(epoch, n)
        firsts = batch.targets[:, 0]
        assert len(set(firsts.tolist())) == n
        assert set(np.diff(np.sort(firsts)).tolist()) == {7}
        orders.append(firsts.tolist())
    assert len({tuple(order) for order in orders}) == 4
    assert len({min(order) for order in orders}) > 1
    assert packed.tokens_per_epoch == 7 * n


def test_batch_is_a_pure_function_of_seed_and_step():
    split = make_split(LENGTHS)
    batch = windows(split).batch(11, 6)
    other = windows(make_split(LENGTHS, shards=7))
    other.batch(0, 6)
    assert equal(batch, other.batch(11, 6))
    assert not equal(batch, windows(split).batch(12, 6))
    assert not equal(batch, windows(split, seed=1).batch(11, 6))


def test_rows_of_processes_and_micro_batches_make_up_the_global_batch():
    packed = windows(make_split(LENGTHS))
    whole = packed.batch(5, 12)
    for parts in (1, 2, 3, 4, 12):
        size = 12 // parts
        cut = [packed.batch(5, 12, slice(i * size, (i + 1) * size)) for i in range(parts)]
        assert equal(whole, Batch(*(np.concatenate(arrays) for arrays in zip(*cut, strict=True))))
    assert equal(whole, Batch(*(np.stack(x) for x in zip(*(packed.row(60 + r) for r in range(12)), strict=True))))
    assert packed.batch(5, 12, slice(3, 3)).inputs.shape == (0, 8)


@pytest.mark.parametrize("n_tokens", [9, 10, 15, 16, 17, 24, 25])
def test_short_corpora_stay_inside_the_stream(n_tokens):
    packed = windows(make_split([n_tokens], end_of_text=None))
    batch = packed.batch(0, 40)
    assert packed.windows_per_epoch == max(1, (n_tokens - 8) // 8)
    assert batch.targets.min() > 0 and batch.targets.max() <= n_tokens


def test_corpus_shorter_than_a_window_names_the_largest_that_would_do():
    with pytest.raises(UserError, match=r"8 tokens .* model\.block_size=8 .* block_size is 7"):
        windows(make_split([8], end_of_text=None))
    windows(make_split([8], end_of_text=None), block_size=7)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permutation_is_one_and_is_computed_place_by_place(n):
    keys = draw_keys(3, 4)[1:]
    whole = permute(np.arange(n), n, keys)
    assert sorted(whole.tolist()) == list(range(n))
    places = np.random.default_rng(0).permutation(n)[:50]
    assert permute(places, n, keys).tolist() == whole[places].tolist()


def test_permutation_of_a_huge_range_stays_inside_it():
    n = 10**15 + 7
    places = permute(np.arange(1000), n, draw_keys(0, 0)[1:])
    assert places.min() >= 0 and places.max() < n and len(set(places.tolist())) == 1000


def test_permutations_are_mixed_like_random_ones():
    """Over many epochs each window comes at each place about equally often, and neighbours part."""
    n, epochs = 12, 6000
    orders = np.array([permute(np.arange(n), n, draw_keys(0, epoch)[1:]) for epoch in range(epochs)])
    counts = np.array([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    expected = epochs / n
    chi_square = ((counts - expected) ** 2 / expected).sum() / (n - 1) ** 2
    assert chi_square < 1.6  # 1 for random permutations, with deviation 0.13
    followed = np.mean(np.diff(orders, axis=1) == 1)
    assert abs(followed - 1 / n) < 0.01


def test_evaluation_takes_each_target_once():
    split = make_split([100])
    for n_windows in (0, 1, 3, 5, 99):
        batches = list(evaluation_batches(split, 8, n_windows, 4, False))
        targets = np.concatenate([batch.targets.ravel() for batch in batches])
        taken = targets[targets >= 0]
        assert len(set(taken.tolist())) == len(taken)
        assert all(array.shape == (4, 8) for batch in batches for array in batch if array is not None)
        if n_windows in (0, 99):
            assert len(taken) == split.n_tokens - 1
        else:
            assert (targets.reshape(-1, 8)[:, 0] >= 0).sum() == n_windows


def test_evaluation_windows_are_spread_over_the_stream():
    batches = list(evaluation_batches(make_split([8001], end_of_text=None), 8, 10, 16, False))
    firsts = batches[0].inputs[:10, 0]
    assert firsts.tolist() == [1 + 800 * i for i in range(10)]


def test_evaluation_of_less_than_a_window_is_one_padded_window():
    (batch,) = evaluation_batches(make_split([4], end_of_text=None), 8, 16, 2, False)
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 0, 0, 0, 0], [0] * 8]
    assert batch.targets.tolist() == [[2, 3, 4, -1, -1, -1, -1, -1], [-1] * 8]
    with pytest.raises(UserError, match="1 tokens"):
        evaluation_batches(make_split([1], end_of_text=None), 8, 16, 2, False)


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_packs_as_one_document_after_another_would(seed):
    rng = np.random.default_rng(seed)
    T, lengths = int(rng.integers(2, 40)), rng.integers(1, 60, int(rng.integers(1, 90)))
    packing = pack_best_fit(np.cumsum(lengths) - lengths, lengths, T)
    spaces = [0] * int((lengths // T).sum())
    for rest in sorted((n % T for n in lengths.tolist() if n % T), reverse=True):
        fits = [space for space in spaces if space >= rest]
        space = min(fits, default=T)
        if fits:
            spaces.remove(space)
        spaces.append(space - rest)
    used = [int(packing.length_P[a:b].sum()) for a, b in itertools.pairwise(packing.first_W.tolist())]
    assert sorted(T - n for n in used) == sorted(spaces)
    assert packing.padding_share(T) == pytest.approx(sum(spaces) / (T * len(spaces)))
    assert packing.n_cut == (lengths > T).sum()


@pytest.mark.parametrize("end_of_text", [END, None])
def test_best_fit_cuts_only_long_documents_and_uses_every_token_once(end_of_text):
    T, split = 8, make_split(LENGTHS, end_of_text)
    stream, starts = split.slice(0, split.n_tokens), split.document_starts(0, split.n_tokens)
    last = len(stream) - (end_of_text is not None)
    orders = []
    for epoch in (0, 1):
        packed = MAKERS["best_fit"](split, T, 3, False)
        n = packed.windows_per_epoch
        batch = packed.windows(np.arange(epoch * n, (epoch + 1) * n))
        assert equal(batch, packed.batch(epoch, n))
        found = []  # positions in the stream
        for row, ranges in enumerate(packed.documents_of(number) for number in range(epoch * n, (epoch + 1) * n)):
            inputs, targets, segments, positions = (field[row] for field in batch)
            for segment, (document, _) in enumerate(ranges):
                (places,) = np.nonzero(segments == segment)
                begin, end = starts[document], [*starts, last][document + 1]
                tokens = inputs[places]
                start = next(i for i in range(begin, end) if (stream[i : i + len(tokens)] == tokens).all())
                stop = start + len(tokens)
                assert stop == end or len(tokens) == T  # only a full window cuts a document
                assert start == begin or end - begin > T
                ends = end_of_text is None and stop == end
                assert targets[places].tolist() == [*stream[start + 1 : stop], -1 if ends else stream[stop]]
                assert positions[places].tolist() == list(range(len(tokens)))
                found += range(start, stop)
            assert (targets[segments >= len(ranges)] == -1).all()
        assert sorted(found) == list(range(last))
        orders.append(batch.inputs.tolist())
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    together = MAKERS["best_fit"](split, T, 3, True).batch(0, n)
    assert together.segments is None
    assert np.array_equal(together.inputs, orders[0])


def test_a_run_packs_as_its_config_says_and_tells_what_that_costs():
    split = make_split(LENGTHS)
    source = Source(ByteTokenizer(), Dataset(split, split, {"hash": "0"}), {})
    made = {}
    for packing in MAKERS:
        config = replace(CONFIG, data={"packing": packing}, model={"block_size": 8})
        made[packing] = KIND.build(config, "", source, compute_options(config), lambda function: function)
    assert made["stream"].notes == ()
    [note] = made["best_fit"].notes
    windows = made["best_fit"].windows
    share = 1 - (split.n_tokens - 1) / windows.tokens_per_epoch
    assert f"{windows.tokens_per_epoch // 8} windows, {share:.2%} padding, 4 of 13 documents cut" in note
    assert not equal(windows.batch(0, 4), made["stream"].windows.batch(0, 4))
