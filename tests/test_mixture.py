"""Several sources in one run: proportions, order, evaluation."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash

from gptjax.batches.mixture import MixtureWindows, Stage, make_cycle, whole_shares
from gptjax.batches.pretraining import Batch, PackedWindows
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.mixtures import SourceConfig
from gptjax.config.run import Config
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.errors import UserError
from gptjax.tasks.pretrain import mixture_stages
from gptjax.tasks.registry import read_source
from gptjax.text.documents import read_origins, read_skipped
from gptjax.text.formats import read_file
from gptjax.text.mixture import prepare_sources
from gptjax.text.prepare import prepare
from gptjax.training import trainer
from gptjax.verbs.evaluate import evaluate_run
from tests.test_batches import make_split
from tests.tiny import assert_trees_equal, final_state, replace, rows, run_config, write_corpus

NAMES = ("web", "books", "code")


def mixture(stages: tuple[Stage, ...], T: int = 8) -> MixtureWindows:
    splits = [make_split([50] * 6), make_split([400]), make_split([7] * 90)]
    return MixtureWindows({n: PackedWindows(s, T, 0, False) for n, s in zip(NAMES, splits, strict=True)}, stages)


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1, 1, 1), (1, 0, 3), (0.123457, 0.654321, 2.2), (1e-4, 1.0)])
def test_every_prefix_has_the_shares_to_less_than_one_sequence(weights):
    cycle = make_cycle(weights)
    M = len(cycle.source_M)
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(cycle.source_M[:, None] == np.arange(len(weights)), axis=0)
    error = counts - np.arange(1, M + 1)[:, None] * shares
    assert np.abs(error).max() < 1 + 1e-9 if M < 10_000 else np.abs(error).max() < 2.1
    np.testing.assert_array_equal(counts[-1], cycle.count_K)


def test_shares_are_exact_where_a_cycle_can_hold_them():
    assert whole_shares((0.7, 0.2, 0.1)) == (7, 2, 1)
    assert whole_shares((2.0, 4.0)) == (1, 2)
    rounded = whole_shares((math.pi, 1.0, 1e-9))
    assert sum(rounded) == 10_000
    assert rounded[2] == 1
    np.testing.assert_allclose(np.array(rounded[:2]) / 1e4, [math.pi / (1 + math.pi), 1 / (1 + math.pi)], atol=2e-4)


@pytest.mark.parametrize("batch_size", [1, 6, 16])
def test_each_source_goes_through_its_windows_in_order_across_changes(batch_size):
    stages = (Stage(0, (0.5, 0.3, 0.2)), Stage(5, (1.0, 0.0, 1.0)), Stage(9, (0.0, 1.0, 3.0)))
    windows = mixture(stages)
    seen = {k: [] for k in range(3)}
    for step in range(14):
        source_B, window_B = windows.choose(step, batch_size)
        assert len(source_B) == batch_size
        for k, window in zip(source_B, window_B, strict=True):
            seen[int(k)].append(int(window))
        if 5 <= step < 9:
            assert 1 not in source_B
    for numbers in seen.values():
        assert numbers == list(range(len(numbers)))
    total = Counter({k: len(numbers) for k, numbers in seen.items()})
    n = np.array([5, 4, 5]) * batch_size
    expected = n @ np.array([[0.5, 0.3, 0.2], [0.5, 0.0, 0.5], [0.0, 0.25, 0.75]])
    np.testing.assert_allclose([total[k] for k in range(3)], expected, atol=3)  # less than one for each stage


def test_sequences_are_those_of_their_source_and_any_process_makes_its_own():
    windows = mixture((Stage(0, (0.5, 0.3, 0.2)),))
    sources = list(windows.sources.values())
    batch = windows.batch(3, 10)
    source_B, window_B = windows.choose(3, 10)
    assert len(set(source_B.tolist())) == 3
    for b in range(10):
        row = sources[source_B[b]].row(int(window_B[b]))
        np.testing.assert_array_equal(batch.inputs[b], row.inputs)
        np.testing.assert_array_equal(batch.targets[b], row.targets)
        np.testing.assert_array_equal(batch.positions[b], row.positions)
        np.testing.assert_array_equal(batch.segments[b], 0 if row.segments is None else row.segments)
    for part in (slice(0, 4), slice(4, 10), np.array([7, 2, 9])):
        mine = windows.batch(3, 10, part)
        assert_trees_equal(mine, Batch(*(array[part] for array in batch)))


def test_documents_are_numbered_over_all_sources():
    windows = mixture((Stage(0, (0.5, 0.3, 0.2)),))
    source_B, window_B = windows.choose(2, 12)
    n = [one.split.n_documents for one in windows.sources.values()]
    for k, window, (first, last) in zip(source_B, window_B, windows.documents(2, 12), strict=True):
        assert sum(n[:k]) <= first <= last < sum(n[: k + 1])
        [(own, _)] = list(windows.sources.values())[k].documents_of(int(window))
        assert first == sum(n[:k]) + own


def test_shares_follow_weights_epochs_or_temperature():
    def stages(temperature: float = 0.0, **options):
        sources = tuple(
            SourceConfig(name=name, **{key: values[i] for key, values in options.items()})
            for i, name in enumerate(("web", "books"))
        )
        config = Config(sources=sources, mixture_temperature=temperature)
        return mixture_stages(config, {"web": 8000, "books": 1000})

    assert stages(weight=(0.5, 2.0)) == (Stage(0, (0.5, 2.0)),)
    assert stages(changes=((), ("10:3", "20:0"))) == (Stage(0, (1, 1)), Stage(10, (1, 3)), Stage(20, (1, 0)))
    assert stages(epochs=(1.0, 4.0)) == (Stage(0, (8000, 4000)),)
    [stage] = stages(temperature=3.0)
    np.testing.assert_allclose(stage.weights, (20.0, 10.0))


@pytest.mark.parametrize(
    "sources,more,message",
    [
        ([{"name": "a"}], {}, "two or more"),
        ([{"name": "a"}, {"name": "a"}], {}, "another name"),
        ([{"name": "a", "weight": 0.0}, {"name": "b", "changes": ("5:0",)}], {}, "0 from step 5"),
        ([{"name": "a", "epochs": 1.0}, {"name": "b"}], {}, "epochs for every source"),
        ([{"name": "a", "weight": 2.0}, {"name": "b"}], {"mixture_temperature": 2.0}, "replaces the weights"),
        ([{"name": "a"}, {"name": "b"}], {"data": DataConfig(path=("x",))}, "only packing, attend_across_documents"),
        ([{"name": "a", "changes": ("x",)}, {"name": "b"}], {}, "must be like 1000:0.5"),
    ],
)
def test_sources_that_contradict_each_other_are_refused(sources, more, message):
    with pytest.raises(UserError, match=message):
        Config(sources=tuple(SourceConfig(**source) for source in sources), **more)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    other = folder / "other"
    other.mkdir()
    for number in range(30):
        (other / f"{number}.md").write_text(f"{number} " + "xyz " * 80)
    sources = (
        SourceConfig(name="letters", weight=3.0, data=DataConfig(path=(str(write_corpus(folder / "letters")),))),
        SourceConfig(name="xyz", changes=("3:9",), data=DataConfig(path=(str(other),))),
    )
    config = replace(run_config(folder), data=DataConfig(), sources=sources)
    assert trainer.train(config) == 0
    return config


def test_a_run_measures_each_source_and_resumes_with_the_same_bits(mixed, tmp_path):
    evaluations = [row for row in rows(mixed) if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6]
    for row in evaluations:
        assert row["val_loss"] == pytest.approx(0.75 * row["letters/val_loss"] + 0.25 * row["xyz/val_loss"])
    # From step 3 on nine of twelve sequences are of the second source.
    assert evaluations[1]["xyz/val_loss"] < evaluations[0]["xyz/val_loss"]
    again = replace(mixed, run_dir=str(tmp_path / "run"))
    shutil.copytree(mixed.run_dir, again.run_dir)
    shutil.rmtree(Path(again.run_dir) / "checkpoints" / "00000006")  # as if it had been killed in its last step
    assert trainer.train(again) == 0
    assert rows(again) == rows(mixed)
    assert_trees_equal(final_state(again)[0].params, final_state(mixed)[0].params)


def test_evaluate_measures_each_source(mixed):
    text = evaluate_run(EvaluateConfig(run_dir=mixed.run_dir, checkpoint="latest", windows=8, batch_size=8), print)
    last = [row for row in rows(mixed) if "val_loss" in row][-1]
    assert f"letters {last['letters/val_loss']:.4f}, xyz {last['xyz/val_loss']:.4f}" in text


def test_data_shows_the_documents_of_a_step_and_ranks_them(mixed, capsys):
    assert main(["data", mixed.run_dir, "--step", "1"]) == 0
    out = capsys.readouterr().out
    sequences = [line for line in out.splitlines() if line.startswith("sequence ")]
    assert len(sequences) == 8
    assert Counter(line.split()[3].rstrip(":") for line in sequences) == {"letters": 6, "xyz": 2}
    for line in out.splitlines():
        if line.startswith("  "):
            _, where, text_hash = line.split()
            assert xxhash.xxh3_64_hexdigest(Path(where).read_bytes()) == text_hash
    assert main(["data", mixed.run_dir, "--rank_loss", "--documents", "0", "--show", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    losses = [float(line[0]) for line in lines]
    assert len(losses) == 4
    assert min(losses[:2]) > max(losses[2:])
    assert main(["data", mixed.run_dir]) == 2
    assert "either --step N" in capsys.readouterr().err


def test_a_skipped_document_has_no_targets_and_all_else_stays(tmp_path):
    split = make_split([50] * 6)
    before, after = (PackedWindows(split, 8, 0, False, skipped) for skipped in (frozenset(), frozenset({2, 4})))
    for step in range(12):
        old, new = before.batch(step, 4), after.batch(step, 4)
        for field in ("inputs", "segments", "positions"):
            np.testing.assert_array_equal(getattr(old, field), getattr(new, field))
        for b, start in enumerate(before.starts(np.arange(step * 4, step * 4 + 4))):
            numbers = np.array([split.document_at(int(start) + t) for t in range(8)])
            np.testing.assert_array_equal(new.targets[b], np.where(np.isin(numbers, (2, 4)), -1, old.targets[b]))


def test_the_skip_list_names_documents_by_hash_line_or_file(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"document {i} " * 3 for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(path=(str(path),))
    prepared = prepare(data, TokenizerConfig(kind="bytes"), tmp_path, report=lambda _: None)
    origins = list(read_origins(prepared.folder, "train"))
    assert len(origins) == prepared.dataset.train.n_documents
    skip = tmp_path / "skip.txt"
    skip.write_text(f"# two of them\n{origins[3].text_hash}\n{origins[7].where}\n")
    config = Config(data=dataclasses.replace(data, skip=str(skip)), tokenizer=TokenizerConfig(kind="bytes"))
    source = read_source(dataclasses.replace(config, cache_dir=str(tmp_path)), None)
    assert source.skipped == {"": frozenset({3, 7})}
    assert read_skipped(prepared.folder, str(skip))[0] == {3, 7}
    skip.write_text(str(path))
    assert len(read_skipped(prepared.folder, str(skip))[0]) == len(origins)
    skip.write_text("0123456789abcdef")
    with pytest.raises(UserError, match="no document is '0123456789abcdef'"):
        read_skipped(prepared.folder, str(skip))


def test_other_weights_are_other_data(mixed):
    changed = tuple(dataclasses.replace(source, changes=()) for source in mixed.sources)
    with pytest.raises(UserError, match="sources"):
        trainer.train(replace(mixed, sources=changed))


def test_a_learned_tokenizer_learns_from_every_source_once(tmp_path, monkeypatch):
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("latin", "greek")}
    texts = {"latin": "lorem ipsum dolor ", "greek": "\u03b1\u03b2\u03b3\u03b4 "}
    for name, path in paths.items():
        path.write_text("".join(json.dumps({"text": f"{i} {texts[name] * 9}"}) + "\n" for i in range(80)))
    sources = {name: DataConfig(path=(str(path),)) for name, path in paths.items()}
    config = TokenizerConfig(kind="bpe", vocab_size=290)
    prepared = prepare_sources(sources, config, tmp_path / "cache", report=lambda _: None)
    latin, greek = prepared.values()
    assert latin.tokenizer.fingerprint == greek.tokenizer.fingerprint
    for name in texts:
        assert len(latin.tokenizer.encode(texts[name])) < len(texts[name].encode()) / 2
    monkeypatch.setattr("gptjax.text.mixture.learned_texts", lambda *_: pytest.fail("learned again"))
    again = prepare_sources(sources, config, tmp_path / "cache", report=lambda _: None)
    assert again["greek"].folder == greek.folder


def test_a_template_puts_fields_together(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"title": "T", "body": {"text": "B {title}"}, "n": 3, "none": None}) + "\n")

    def read(template: str) -> list[str]:
        return [document.text for document in read_file(Path(path), DataConfig(template=template), Counter())]

    assert read("{title}\n{body.text} {n} {}") == ["T\nB {title} 3 {}"]
    for template, message in (("{tilte}", "data.template.*Did you mean 'title'"), ("{none}", "is null")):
        with pytest.raises(UserError, match=message):
            read(template)
    with pytest.raises(UserError, match="must name a field in braces"):
        DataConfig(template="text")
