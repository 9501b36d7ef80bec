"""The live panel: everything that is promised is on it, nothing is wider than the terminal, and nothing acts on it."""

import io
import re

import pytest
from rich.console import Console

from gptjax.report import progress
from gptjax.report.panel import PLAIN_SPARKS, View, panel, sparkline
from gptjax.report.progress import Progress

ROW = {"learning_rate": 3e-4, "grad_norm": 0.512, "tokens_per_s": 15448.0, "skipped": 2}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def drawn(view: View, width: int, unicode: bool = True) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(panel(view, width, unicode))
    return out.getvalue().splitlines()


def test_the_panel_has_all_figures_in_80_columns():
    view = View("runs/mine", 2000, 1200, "training", "12:34", [4.0, 3.0, 1.8839], 9.9e-4, 1.23, 15448.0, 0.412, 0.003)
    view.memory, view.skipped, view.evaluation, view.sample = 1_500_000_000, 2, "step 1,000: loss 1.9", "ROMEO: " * 30
    lines = drawn(view, 80)
    assert {len(line) for line in lines} == {80}
    text = "\n".join(lines)
    for figure in ("runs/mine", "step 1,200 of 2,000", "60%", "12:34 left", "loss 1.8839  █▅▁", "9.90e-04", "1.23",
                   "15,448 tokens/s", "MFU 41.2%", "data wait 0.3%", "memory 1.5 GB", "2 steps skipped",
                   "step 1,000: loss 1.9", "ROMEO: ROMEO"):  # fmt: skip
        assert figure in text, figure


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_bar_is_as_long_as_the_share_of_steps(width):
    bars = [drawn(View("r", 100, step), width)[1] for step in (0, 50, 100)]
    counts = [line.count("━") for line in bars]
    assert counts[0] == 0 and counts[2] > width - 40 and abs(counts[1] - counts[2] / 2) <= 2
    assert "━" not in drawn(View("r", 100, 50, losses=[1.0, 2.0]), width, unicode=False)[1]


def test_a_sparkline_shows_rise_and_fall():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2, PLAIN_SPARKS) == "_#", "means of neighbours"
    assert sparkline([5.0] * 3, 9) == "▁▁▁" and sparkline([], 5) == "" and sparkline([float("nan"), 1.0], 5) == "▁"


def test_a_terminal_gets_the_panel_and_a_small_one_a_line(monkeypatch):
    for columns, rows, has_panel in ((80, 24, True), (79, 24, False), (80, 15, False)):
        terminal = Terminal()
        monkeypatch.setattr(progress.sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(rows))
        monkeypatch.setenv("TERM", "tmux-256color")
        shown = Progress(10, 0, lambda step: 0, 0, 1, 100.0, 1e7, "[bold]runs/x\x1b[2J")
        shown.step({"step": 4, "loss": 2.5, **ROW}, data_wait=0.25, memory=3_000_000)
        shown.evaluated(4, "loss 2.6 (best)")
        shown.sample("Hi\x1b[31m there [red]you[/red]")
        with shown.evaluation(5, 3) as before_batch:
            before_batch()
        shown.step({"step": 5, "loss": 2.4, **ROW})
        shown.close()
        text = terminal.getvalue()
        assert "\x1b[2J" not in text and "\x1b[31m" not in text and "\x1b[?1049h" not in text
        assert ("╭─" in text) == has_panel
        if has_panel:
            assert "[bold]runs/x\ufffd[2J" in text and "data wait 25.0%" in text and "memory 3 MB" in text
            assert "MFU 15.4%" in text and "evaluating, batch 1 of 3" in text
            assert re.search(r"sample +Hi\ufffd\[31m there \[red\]you", text)
        assert "step 4 · validation loss 2.6 (best)" in text, "results stay above the panel"


def test_without_a_terminal_nothing_but_lines(capsys):
    shown = Progress(10, 0, lambda step: 0, 0, 1, 0.0, None, "runs/x")
    shown.step({"step": 4, "loss": 2.5, **ROW}, data_wait=0.25, memory=3_000_000)
    shown.evaluated(4, "loss 2.6")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 4/10 · loss 2.5000 · lr 3.00e-04 · grad 0.51 · 15,448 tokens/s · 2 steps skipped")
    assert lines[1:] == ["step 4 · validation loss 2.6"]
