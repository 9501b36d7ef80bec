"""Reference curves: means and bands of seeds, found by runs of the preset alone, and shown by panel and report."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gptjax.config.reader import load_config
from gptjax.config.start import start_config
from gptjax.report import html, reference
from gptjax.report.events import add_event
from gptjax.report.progress import Progress
from gptjax.report.record import read_record
from gptjax.report.reference import Reference, find_reference, make_reference, options_that_matter, references
from tests.test_report import Page, write_run
from tests.tiny import CONFIG, replace

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = Reference("small", {}, "abc", [1, 2, 3], [1, 40], [4.0, 2.0], [10, 20], [3.0, 2.0], [0.1, 0.2])


def rows(shift: float) -> list[dict]:
    steps = [{"step": n, "loss": 5 - n / 10 + shift, "tokens_per_s": 1.0} for n in range(1, 31)]
    return steps + [{"step": n, "val_loss": 4 - n / 10 + shift} for n in (10, 20, 30)]


def test_a_reference_is_mean_and_band_of_the_seeds():
    shifts = {1: -0.3, 2: 0.0, 3: 0.6}
    made = make_reference("small", CONFIG, "abc", {seed: rows(shift) for seed, shift in shifts.items()})
    assert made.evaluated == [10, 20, 30] and made.val_loss == pytest.approx([3.1, 2.1, 1.1])
    assert made.band == pytest.approx([2 * np.std([-0.3, 0.0, 0.6], ddof=1)] * 3, abs=1e-4)
    assert made.loss[0] == pytest.approx(4.9 + 0.1)


def test_only_runs_with_the_options_and_data_of_the_preset_have_a_reference():
    config, known = load_config(CONFIGS / "shakespeare_cpu.yaml"), references()["shakespeare_cpu"]
    other = replace(
        config, run_dir="x", seed=7, model={"vocab_size": 65}, train={"log_every": 5}, data={"path": ("a",)}
    )
    assert find_reference(other, known.data_hash) is known
    assert find_reference(other, "other data") is None
    assert find_reference(replace(config, optim={"learning_rate": 2e-3}), known.data_hash) is None


@pytest.mark.parametrize("preset", references())
def test_presets_still_have_the_options_of_their_reference(preset):
    config = load_config(CONFIGS / f"{preset}.yaml")
    assert json.loads(json.dumps(options_that_matter(config))) == references()[preset].options, (
        f"{preset}.yaml or a default changed: make its reference again with bench/reference_curves.py"
    )


def test_the_distance_is_taken_at_the_step_of_the_run():
    assert SMALL.validation(15, 2.7) == pytest.approx((0.2, 0.15))
    assert SMALL.validation(5, 2.7) is None and SMALL.validation(21, 2.7) is None
    line = [(n, 4.0 - 2.0 * (n - 1) / 39 + 0.25) for n in range(1, 21)]
    assert SMALL.training(line) == pytest.approx(0.25)
    assert SMALL.training(line[:9]) is None


def test_lines_and_page_show_the_distance(tmp_path, monkeypatch, capsys):
    progress = Progress(20, 0, lambda _: 0, 0, 1, 0.0, None, "", SMALL)
    for n in range(1, 12):
        row = {"step": n, "loss": 4.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_s": 1.0, "skipped": 0}
        progress.step(row)
    progress.evaluated(15, "loss 2.7", 2.7)
    shown = capsys.readouterr().out.splitlines()
    expected = 4.0 - np.mean([4.0 - 2.0 * (n - 1) / 39 for n in range(1, 12)])
    assert f" · {expected:+.3f} to reference · " in shown[-2] and "to reference" not in shown[8]
    assert shown[-1] == "step 15 · validation loss 2.7 · +0.2000 to reference (band 0.1500)"
    monkeypatch.setattr(reference, "references", lambda: {"small": SMALL})
    monkeypatch.setattr(html, "references", lambda: {"small": SMALL})
    run = write_run(tmp_path / "run", loss=lambda n: 4 - n / 10)
    add_event(run, "start", 0, reference="small")
    page = Page(html.render([read_record(run)]))
    assert "+0.5000" in page.text and "reference of small at step 20, band 0.2000" in page.text
    table = page.data["runs"][0]["reference"]
    assert table["val_loss"] == [3.0, 2.0] and table["high"] == pytest.approx([3.1, 2.2])
    assert {"run": 0, "table": "reference", "column": "val_loss"} in page.data["charts"][0]["series"]


def test_the_report_names_what_was_changed_in_the_file_and_the_sizes_of_the_data(tmp_path):
    started = start_config(str(CONFIGS / "demo.yaml"), {"optim": {"learning_rate": 5e-4}, "seed": 3}, False)
    rate = load_config(CONFIGS / "demo.yaml").optim.learning_rate
    assert started.origin is not None
    assert started.origin.changed == {"seed": (0, 3), "optim.learning_rate": (rate, 5e-4)}
    run = write_run(tmp_path / "run")
    sizes = {"documents": 12, "tokens": 3456, "bytes": 13824}
    data = [{"source": "", "split": "train", **sizes, "left out": {"empty": 7}}]
    add_event(run, "start", 0, origin=dataclasses.asdict(started.origin), data=data)
    text = Page(html.render([read_record(run)])).text
    for words in ("Changed from ", "demo.yaml", "0.0005", "3,456", "13,824", "4.0", "7 empty"):
        assert words in text, words
    add_event(run, "resume", 5, origin={"changed": 3}, data=[{"split": 1}])
    assert "demo.yaml" in html.render([read_record(run)]), "what cannot be read is passed over"
