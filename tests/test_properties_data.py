"""Properties of what a run reads and of what it is measured by, each against a definition written out here."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.batches.labelled import POOL, TextBatch, TextBatches, encode_texts
from gptjax.batches.packed import PackedSequences, TargetSequence, encode_words
from gptjax.batches.pretraining import PackedWindows, evaluation_batches
from gptjax.config.data import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.evaluation.labels import Predictions, confusion, expected_calibration_error, score, table
from gptjax.evaluation.loss import make_eval_step, measure
from gptjax.evaluation.predict import predict_rows, predict_words
from gptjax.model.gpt import Compute
from gptjax.tasks import pretrain
from gptjax.tasks.instruct import measure_chats
from gptjax.tasks.registry import parse, read_examples
from gptjax.tasks.task import Source
from gptjax.text.formats import Row
from gptjax.text.labelled import Text, Words
from gptjax.text.prepare import prepare
from gptjax.text.shards import Dataset, TokenSplit
from gptjax.text.tokenizer import make_tokenizer
from tests.tiny import CONFIG, MODEL, init_params, replace

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), lambda: [])
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def split_of(lengths, cuts, end_of_text: int | None = 0) -> tuple[TokenSplit, np.ndarray]:
    """Documents of random tokens from 1 to 63, each after its end-of-text, cut into shards at `cuts`; and the document
    of each token.
    """
    random, mark = np.random.default_rng(0), [] if end_of_text is None else [end_of_text]
    stream = np.concatenate([[*mark, *random.integers(1, 64, length)] for length in lengths] + [mark]).astype(np.uint16)
    sizes = [length + len(mark) for length in lengths]
    owner = np.append(np.repeat(np.arange(len(lengths)), sizes), np.full(len(mark), len(lengths) - 1, int))
    starts = np.cumsum([0, *sizes[:-1]])
    edges = [0, *cuts, len(stream)]
    pairs = list(itertools.pairwise(edges))
    documents = tuple((starts[(starts >= a) & (starts < b)] - a).astype(np.uint64) for a, b in pairs)
    return TokenSplit(tuple(stream[a:b] for a, b in pairs), documents, sum(lengths), end_of_text), owner


LENGTHS = [5, 1, 30, 8, 8, 2, 3, 17, 40, 1, 1, 1, 20]


@pytest.mark.parametrize("cuts", [(), (40,), (6, 7, 44, 45, 90)], ids=str)
@pytest.mark.parametrize("end_of_text", [0, None])
def test_the_document_of_a_token_is_the_one_that_it_was_written_in(cuts, end_of_text):
    split, owner = split_of(LENGTHS, cuts, end_of_text)
    assert [split.document_at(position) for position in range(split.n_tokens)] == owner.tolist()
    packed = PackedWindows(split, 8, seed=1, attend_across_documents=False)
    stream = split.slice(0, split.n_tokens)
    for step in range(5):
        for inputs, found in zip(packed.batch(step, 4).inputs, packed.documents(step, 4), strict=True):
            places = [i for i in range(len(stream) - 8) if np.array_equal(stream[i : i + 8], inputs)]
            assert found in {(owner[i], owner[i + 7]) for i in places}


@pytest.mark.parametrize("n_tokens", [99, 800, 801, 1234])
@pytest.mark.parametrize("n_windows", [2, 3, 7, 12])
def test_evaluation_windows_are_evenly_spaced(n_tokens, n_windows):
    stream = np.arange(n_tokens, dtype=np.uint16)
    split = TokenSplit((stream,), (np.zeros(1, np.uint64),), n_tokens, None)
    batches = evaluation_batches(split, 8, n_windows, 5, True)
    rows = np.concatenate([b.inputs[b.targets[:, 0] >= 0] for b in batches])
    total = math.ceil((n_tokens - 1) / 8)
    numbers = rows[:, 0] // 8
    assert len(numbers) == min(n_windows, total) and numbers[0] == 0
    gaps = np.diff([*numbers, total])
    assert gaps.max() - gaps.min() <= 1 and gaps.min() >= 1


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda p: 8 * p, init_params(MODEL, jax.random.key(0)))


def test_the_validation_loss_is_the_same_for_every_batch_size(params):
    split, _ = split_of([61, 47, 30], (70,))
    eval_step = jax.jit(make_eval_step(MODEL, Compute(unroll=1)))
    found = [
        measure(eval_step, params, evaluation_batches(split, 16, 0, size, False), DEVICE, 1.0).val_loss
        for size in (1, 4, 9)  # nine windows, the last one filled in part: batches of 4 leave three rows empty
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-6)
    losses = [
        [float(x) for x in eval_step(params, jax.tree.map(jnp.asarray, batch))]
        for batch in evaluation_batches(split, 16, 0, 1, False)
    ]
    assert found[0] == pytest.approx(sum(nll for nll, _ in losses) / (split.n_tokens - 1), rel=1e-6)


def test_labels_and_their_loss_are_the_same_for_every_batch_size():
    texts = [Text("x" * (n % 29), ("ab"[n % 2],), "") for n in range(23)]
    words = [Words(("ab",) * (n % 5 + 1), ("a",) * (n % 5 + 1), "") for n in range(23)]

    def predict(_params, batch):
        """Probabilities and losses that depend on a text, or on a place in a sentence, alone."""
        asked = batch.targets >= 0
        size = batch.lengths if isinstance(batch, TextBatch) else batch.positions
        p = (1.0 + size % 7) / 9
        return jnp.stack([p, 1 - p], axis=-1), jnp.stack([jnp.sum(size * asked), jnp.sum(asked)])

    def predict_texts(predict, params, rows, batch_size, sharding):
        probabilities, loss = predict_rows(predict, params, rows, 2, batch_size, sharding)
        return Predictions(probabilities, rows.targets, ("a", "b")), loss

    encoded = encode_texts(texts, BYTES, ("a", "b"), False, 32)
    tagged = encode_words(words, BYTES, ("a", "b"), 24, 0)
    sizes = {
        predict_texts: np.array([len(ids) for ids in encoded.tokens]),
        predict_words: np.concatenate(tagged.positions),
    }
    for predict_all, examples in ((predict_texts, encoded), (predict_words, tagged)):
        for batch_size in (1, 5, 64):
            predictions, loss = predict_all(predict, {}, examples, batch_size, DEVICE)
            np.testing.assert_allclose(
                predictions.probabilities_EN[:, 0], (1.0 + sizes[predict_all] % 7) / 9, rtol=1e-6
            )
            assert loss == pytest.approx(sizes[predict_all].mean(), rel=1e-6)


def two_nats_a_target(_function):
    """In place of a compiled evaluation step: every target costs 2 nats."""
    return lambda _params, batch: (2.0 * np.sum(batch.targets >= 0), np.sum(batch.targets >= 0))


def test_bits_per_byte_times_bytes_is_the_summed_loss(tmp_path):
    texts = [f"text {n} é" * (n % 3 + 1) for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    data = DataConfig(path=(str(tmp_path / "a.jsonl"),), validation_fraction=0.3)
    prepared = prepare(data, TokenizerConfig(kind="bytes"), tmp_path, report=lambda _: None)
    validation = prepared.dataset.validation
    held_out = BYTES.decode(validation.slice(0, validation.n_tokens))
    size = sum(len(text.encode()) for text in held_out.split("<|endoftext|>"))
    config = replace(CONFIG, train={"eval_windows": 0, "batch_size": 3}, model={"vocab_size": 257})
    source = Source(prepared.tokenizer, prepared.dataset, {})
    found = pretrain.build(config, "", source, Compute(), two_nats_a_target).evaluate({}, DEVICE)
    assert found.val_loss == pytest.approx(2)
    assert found.perplexity == pytest.approx(math.exp(2))
    assert found.bits_per_byte * size * math.log(2) == pytest.approx(2 * (validation.n_tokens - 1))


@pytest.mark.parametrize("across", [False, True])
def test_documents_see_each_other_where_the_config_says_so(across):
    split, _ = split_of(LENGTHS, ())
    data = DataConfig(path=("x",), attend_across_documents=across)
    config = replace(CONFIG, train={"eval_windows": 0, "batch_size": 3})
    seen = []

    def look(_function):
        return lambda _params, batch: seen.append(batch) or (1.0, 1.0)

    source = Source(BYTES, Dataset(split, split, {"hash": ""}), {})
    task = pretrain.build(dataclasses.replace(config, data=data), "", source, Compute(), look)
    task.evaluate({}, DEVICE)
    assert [batch.segments is None for batch in (task.windows.batch(0, 4), *seen)] == [across] * (len(seen) + 1)
    for batch in (task.windows.batch(0, 4), seen[0]):
        assert bool(np.all(batch.positions == np.arange(16)[None])) == across


def test_bits_per_byte_of_chats_is_over_what_the_assistant_says(tmp_path):
    """Prompts cost nothing and count nothing, and neither does a last turn of the user."""
    task = TaskConfig(kind="instruct", template="<{role}>{content}|")
    config = dataclasses.replace(CONFIG, task=task, model=replace(CONFIG, model={"block_size": 300}).model)
    found = []
    for prompt in ("q", "a much longer question, é"):
        turns = [("user", prompt), ("assistant", "yes é"), ("user", prompt), ("assistant", "no"), ("user", prompt)]
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        chats = list(parse([Row(row, "a:1")], task, DataConfig()))
        found.append(measure_chats(config, BYTES, chats, Compute(), two_nats_a_target)({}, DEVICE))
    size = len("yes é|no|".encode()) + 2 * len(">")  # the tokenizer may join ">" to the response, so it is a target
    for evaluation in found:
        assert evaluation.val_loss == pytest.approx(2)
        assert evaluation.bits_per_byte * size * math.log(2) == pytest.approx(2 * size)  # a byte is a token


def test_equal_sentences_are_on_one_side_whatever_their_tags(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"tokens": [f"w{n % 40}", "x"], "tags": ["ab"[n % 3 == 0], "ab"[n % 7 == 0]]} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_examples(TaskConfig(kind="tag"), DataConfig(path=(str(path),), validation_fraction=0.3))
    train, validation = ({example.words for example in side} for side in (found.train, found.validation))
    assert not train & validation and len(train | validation) == 40 and len(validation) > 3


def test_an_epoch_of_packed_sequences_takes_each_once_in_an_order_of_its_own():
    sequences = [TargetSequence(np.full(5, n, np.int32), np.full(5, n, np.int32)) for n in range(1, 41)]
    packed = PackedSequences(sequences, 10, seed=2)
    n = len(packed.windows)
    epochs = [packed.batch(epoch, n).inputs[:, 0].tolist() for epoch in range(3)]
    assert n == 20 and len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    together = [{tuple(sorted(window)) for window in PackedSequences(sequences, 10, seed).windows} for seed in (2, 3)]
    assert len(together[0] & together[1]) < n / 2, "another seed packs other sequences together"


def text_batches(**task) -> TextBatches:
    """40 texts of other lengths and letters, as batches of 5: eight of them are an epoch and a pool."""
    texts = [Text(chr(65 + n) * (n * 7 % 40 + 2), ("ab"[n % 2],), "") for n in range(5 * POOL)]
    config = TaskConfig(kind="classify", **task)
    return TextBatches(encode_texts(texts, BYTES, ("a", "b"), False, 64), config, seed=1)


def test_a_batch_holds_texts_of_like_length_and_batches_come_in_any_order():
    batches = text_batches()
    for epoch in range(3):
        lengths = [batches.batch(epoch * POOL + place, 5).lengths for place in range(POOL)]
        in_order = sorted(lengths, key=min)
        assert all(max(a) <= min(b) for a, b in itertools.pairwise(in_order))
        assert [min(length) for length in lengths] != [min(length) for length in in_order]


def test_augmentation_is_drawn_anew_for_each_text_and_in_each_epoch():
    plain, noisy = text_batches(), text_batches(augment_delete=0.5)
    left = {}
    for step in range(2 * POOL):
        for row, length, numbers in zip(*noisy.batch(step, 5)[:2], plain.documents(step, 5), strict=True):
            left.setdefault(numbers[0], []).append(length / plain.texts.tokens[numbers[0]].size)
            assert set(row[1 : length - 1]) <= set(plain.texts.tokens[numbers[0]].tolist())
    assert sum(first != second for first, second in left.values()) > 20
    assert len({first for first, _ in left.values()}) > 20


def one_label(E: int = 200, N: int = 4) -> Predictions:
    """Unequal labels, one of them never predicted and another one with no example."""
    random = np.random.default_rng(0)
    targets = random.choice(N, E, p=[0.55, 0.25, 0.2, 0.0])
    logits = random.normal(size=(E, N)) * 2 + 1.5 * np.eye(N)[targets] - np.array([0.0, 1.0, 50.0, 2.0])
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return Predictions(p / p.sum(axis=1, keepdims=True), targets, tuple("abcd"))


def several_labels() -> Predictions:
    probabilities = np.array([[0.6, 0.4, 0.51], [0.2, 0.49, 0.9], [0.45, 0.55, 0.1], [0.7, 0.8, 0.3]])
    return Predictions(probabilities, np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 1, 0]]), tuple("abc"))


def f1_of(truth, chosen) -> float:
    """Of one label, from its definition; 0 where it is undefined."""
    right = np.sum(truth & chosen)
    return 2 * right / max(1, np.sum(truth) + np.sum(chosen))


def test_scores_of_one_label_are_those_of_their_definitions():
    predictions = one_label()
    truth, chosen = predictions.targets, predictions.probabilities_EN.argmax(axis=1)
    np.testing.assert_array_equal(predictions.chosen, chosen)
    assert 2 not in chosen and {0, 1, 3} <= set(chosen.tolist()) and 3 not in truth, "the hard cases are among them"
    found = score(predictions, 0.25)
    assert found.val_loss == 0.25
    assert found.accuracy == pytest.approx(np.mean(truth == chosen))
    assert found.macro_f1 == pytest.approx(np.mean([f1_of(truth == n, chosen == n) for n in range(4)]))
    expected = np.zeros((4, 4), int)
    for row, column in zip(truth, chosen, strict=True):
        expected[row, column] += 1
    assert not np.array_equal(expected, expected.T)
    np.testing.assert_array_equal(confusion(predictions), expected)
    lines = table(predictions, found).splitlines()
    precision, recall = expected[1, 1] / expected[:, 1].sum(), expected[1, 1] / expected[1].sum()
    [row] = [line.split() for line in lines if line.split()[:1] == ["b"] and "." in line]
    assert row[1:] == [f"{x:.4f}" for x in (precision, recall, f1_of(truth == 1, chosen == 1))] + [str(sum(truth == 1))]


def test_scores_of_several_labels_are_those_of_their_definitions():
    predictions = several_labels()
    chosen = np.array([[1, 0, 1], [0, 0, 1], [0, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(predictions.chosen, chosen)
    found = score(predictions, 0.0)
    assert found.accuracy == 0.5, "all labels of a text must be right"
    truth = predictions.targets
    assert found.macro_f1 == pytest.approx(np.mean([f1_of(truth[:, n] == 1, chosen[:, n] == 1) for n in range(3)]))


def calibration(confidence, right) -> float:
    """The expected calibration error over 15 bins, written out (arXiv:1706.04599, equation 3)."""
    total = 0.0
    for low in range(15):
        here = [
            (c, r) for c, r in zip(confidence, right, strict=True) if low / 15 <= c < (low + 1) / 15 or c == low == 1
        ]
        if here:
            gap = np.mean([c for c, _ in here]) - np.mean([r for _, r in here])
            total += len(here) / len(confidence) * abs(gap)
    return total


def test_the_calibration_error_is_that_of_its_definition():
    one, several = one_label(), several_labels()
    p = one.probabilities_EN
    expected = calibration(p.max(axis=1).tolist(), p.argmax(axis=1) == one.targets)
    assert expected > 0.05
    assert expected_calibration_error(one) == pytest.approx(expected)
    p = several.probabilities_EN.ravel()
    expected = calibration(np.maximum(p, 1 - p).tolist(), (p > 0.5) == several.targets.ravel())
    assert expected_calibration_error(several) == pytest.approx(expected)
