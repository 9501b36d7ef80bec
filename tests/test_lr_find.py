"""The range test: rates rise as asked, the suggestion follows the curve, and a real run is measured."""

import math
from pathlib import Path

import numpy as np
import pytest

from gptjax.cli import main
from gptjax.config.reader import to_yaml
from gptjax.errors import UserError
from gptjax.training.lr_range import rates_of, suggest
from tests.test_report import Page
from tests.tiny import run_config


def curve(rates, fall: float, rise: float) -> list[float]:
    """A loss that falls by two nats around one rate and rises without bound above another."""
    return [4 - 2 / (1 + (fall / rate) ** 2) + (rate / rise) ** 2 for rate in rates]


def test_the_suggestion_follows_the_curve():
    rates = rates_of(1e-6, 1.0, 400)
    assert rates[0] == 1e-6 and rates[-1] == pytest.approx(1.0)
    np.testing.assert_allclose(np.diff(np.log(rates)), np.log(1e6) / 399)
    found = suggest(rates, curve(rates, 1e-4, 1e-1), 400)
    assert 0.7e-4 < found.steepest < 4e-4 and 4e-3 < found.lowest < 8e-2
    assert found.rate == pytest.approx(found.lowest / 3, rel=0.05) and found.diverged is None
    other = suggest(rates, curve(rates, 1e-3, 1.0), 400)
    assert 5 < other.steepest / found.steepest < 20
    losses = [*curve(rates[:300], 1e-4, 1e-1), math.nan]
    assert suggest(rates[:301], losses, 400).diverged == rates[300]


def test_without_a_fall_nothing_is_suggested():
    rates = rates_of(1e-9, 1e-8, 50)
    for losses in ([4.0] * 50, [4 + n / 50 for n in range(50)], [math.nan]):
        with pytest.raises(UserError, match="did not fall"):
            suggest(rates, losses, 50)


def test_a_run_is_measured_and_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = run_config(tmp_path)
    (tmp_path / "a.yaml").write_text(to_yaml(config))
    assert main(["lr-find", "a.yaml", "--low", "1e-4", "--high", "10", "--steps", "40"]) == 0
    printed = capsys.readouterr().out
    assert "suggestion  --optim.learning_rate" in printed and not Path(config.run_dir).exists()
    table = Page((tmp_path / "lr_find.html").read_text()).data["runs"][0]["steps"]
    rates, losses = table["learning rate"], table["loss"]
    np.testing.assert_allclose(rates, rates_of(1e-4, 10, 40)[: len(rates)])
    assert losses[0] > 5 and min(losses) < 4.5, "bytes at random, then learned"
    assert main(["lr-find", "a.yaml", "--low", "1", "--high", "0.1"]) == 2
