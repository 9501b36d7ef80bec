import itertools

import numpy as np
import pytest

from gptjax.batches.permutation import draw_keys, permute
from gptjax.batches.pretraining import Batch, PackedWindows, evaluation_batches
from gptjax.errors import UserError
from gptjax.text.shards import TokenSplit

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
