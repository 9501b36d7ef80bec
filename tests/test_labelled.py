import dataclasses

import numpy as np
import pytest

from gptjax.batches.labelled import POOL, TextBatches, encode_texts, ordered_batches, widths
from gptjax.batches.packed import PackedSequences, encode_words
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.text.labelled import Text, Words
from gptjax.text.tokenizer import make_tokenizer

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), lambda: [])
END = BYTES.end_of_text
TASK = TaskConfig(kind="classify")
TEXTS = [Text(f"{n:03}" + "x" * (n % 20), ("ab"[n % 3 == 0],), f"a:{n}") for n in range(60)]


def texts(max_tokens: int = 32, examples=TEXTS):
    return encode_texts(examples, BYTES, ("a", "b"), False, max_tokens)


def name_of(row, length) -> str:
    return BYTES.decode(row[1 : length - 1])


def test_an_epoch_takes_every_text_once():
    batches = TextBatches(texts(examples=TEXTS[: POOL * 5]), TASK, seed=3)
    seen = [name_of(*pair) for step in range(2 * POOL) for pair in zip(*batches.batch(step, 5)[:2], strict=True)]
    first, second = seen[: POOL * 5], seen[POOL * 5 :]
    assert sorted(first) == sorted(second) == [e.text for e in TEXTS[: POOL * 5]]
    assert first != second


def test_batches_follow_from_seed_and_step_alone():
    one, other = TextBatches(texts(), TASK, seed=3), TextBatches(texts(), TASK, seed=3)
    for step in (17, 2):
        for a, b in zip(one.batch(step, 4), other.batch(step, 4), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.batch(2, 4).inputs, TextBatches(texts(), TASK, seed=4).batch(2, 4).inputs)


def test_batches_have_few_lengths_and_fit_their_texts():
    batches = TextBatches(texts(), TASK, seed=0)
    lengths = set()
    for step in range(40):
        batch = batches.batch(step, 4)
        T = batch.inputs.shape[1]
        assert next(width for width in widths(32) if width >= batch.lengths.max()) == T
        lengths.add(T)
    assert lengths <= set(widths(32)) and len(lengths) > 1


def test_long_texts_keep_their_beginning_and_are_counted():
    found = texts(max_tokens=8)
    np.testing.assert_array_equal(found.cut, [len(e.text) > 6 for e in TEXTS])
    assert all(len(ids) <= 8 and ids[0] == ids[-1] == END for ids in found.tokens)
    assert name_of(found.tokens[19], 8) == "019xxx"


def test_balanced_weights_make_classes_equal():
    batches = TextBatches(texts(), dataclasses.replace(TASK, class_weights="balanced"), seed=0)
    total = {0: 0.0, 1: 0.0}
    for step in range(3 * POOL):  # 3 * 8 * 5 = 120 draws: two epochs
        batch = batches.batch(step, 5)
        for target, weight in zip(batch.targets.tolist(), batch.weights.tolist(), strict=True):
            total[target] += weight
    assert total[0] == pytest.approx(total[1]) == pytest.approx(60)


@pytest.mark.parametrize("change", [{"augment_delete": 0.3}, {"augment_swap": 0.3}])
def test_augmentation_changes_texts_but_neither_ends_nor_validation(change):
    plain, noisy = TextBatches(texts(), TASK, 1), TextBatches(texts(), dataclasses.replace(TASK, **change), 1)
    before, after, again = plain.batch(0, 8), noisy.batch(0, 8), noisy.batch(0, 8)
    np.testing.assert_array_equal(after.inputs, again.inputs)
    assert not np.array_equal(after.inputs[:, : before.inputs.shape[1]], before.inputs[:, : after.inputs.shape[1]])
    for row, length, old, old_length in zip(*after[:2], *before[:2], strict=True):
        assert row[0] == row[length - 1] == END
        new, was = sorted(row[1 : length - 1].tolist()), sorted(old[1 : old_length - 1].tolist())
        assert new == was if "augment_swap" in change else len(new) <= len(was) and set(new) <= set(was)


def test_measuring_takes_every_text_once_whatever_the_batch():
    for batch_size in (1, 7, 64):
        numbers = np.concatenate([n for n, _ in ordered_batches(texts(), batch_size)])
        assert sorted(numbers[numbers >= 0].tolist()) == list(range(60))
    *_, (numbers, last) = ordered_batches(texts(), 7)
    empty = numbers < 0
    assert empty.sum() == -60 % 7
    assert (last.weights[empty] == 0).all() and (last.targets[empty] == -1).all() and (last.lengths[empty] == 0).all()


def test_several_labels_are_a_row_of_zeros_and_ones():
    examples = [Text("u", ("b", "a"), ""), Text("v", (), ""), Text("w", ("b",), "")]
    found = encode_texts(examples, BYTES, ("a", "b"), True, 8)
    np.testing.assert_array_equal(found.targets, [[1, 1], [0, 0], [0, 1]])


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("max_tokens", [64, 9])
def test_a_words_label_stands_at_its_last_token_plus_the_lookahead(lookahead, max_tokens):
    sentences = [Words(("The", "dogs", "ran"), ("at", "nn", "vb"), ""), Words(("Go",), ("vb",), "")]
    labels = ("at", "nn", "vb")
    words = encode_words(sentences, BYTES, labels, max_tokens, lookahead)
    found = []
    for sequence, positions in zip(words.sequences, words.positions, strict=True):
        assert len(sequence.inputs) <= max_tokens
        np.testing.assert_array_equal(np.flatnonzero(sequence.targets >= 0), positions)
        start = 1
        for position in positions:
            end = position - lookahead + 1
            found.append((BYTES.decode(sequence.inputs[start:end]).strip(), labels[sequence.targets[position]]))
            start = end
        assert (sequence.inputs[start:] == END).all() and len(sequence.inputs) - start == lookahead
    assert found == [("The", "at"), ("dogs", "nn"), ("ran", "vb"), ("Go", "vb")]
    assert words.lengths == (3, 1)


def test_packing_keeps_every_sequence_whole_and_once():
    sentences = [Words(("w" * (n % 9 + 1),) * (n % 4 + 1), ("x",) * (n % 4 + 1), "") for n in range(50)]
    words = encode_words(sentences, BYTES, ("x",), 48, 0)
    packed = PackedSequences(words.sequences, 48, seed=5)
    seen = []
    steps = -(-len(packed.windows) // 4)
    for step in range(steps):
        batch = packed.batch(step, 4)
        for row in zip(*batch, strict=True):
            seen += [tuple(part[0].tolist()) for part in pieces(*row)]
    expected = sorted(tuple(s.inputs.tolist()) for s in words.sequences)
    assert sorted(set(seen)) == sorted(set(expected)) and len(seen) >= len(expected)
    assert len(packed.windows) * 48 < 1.3 * packed.tokens_per_epoch
    order = [numbers for windows, _ in packed.ordered(4) for window in windows for numbers in window]
    assert sorted(order) == list(range(len(words.sequences)))


def pieces(inputs, targets, segments, positions):
    """The sequences of one window, checked to be whole segments whose positions begin at 0."""
    for segment in range(segments.max() + 1):
        here = segments == segment
        if (targets[here] >= 0).any():
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            yield inputs[here], targets[here]
