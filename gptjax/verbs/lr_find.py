"""`gptjax lr-find`."""

import tempfile
from pathlib import Path

from gptjax.config.run import Config
from gptjax.config.verbs.lr_find import LrFindConfig
from gptjax.files import check_writable, write_atomic
from gptjax.machine import compile_cache
from gptjax.report.page import chart_page
from gptjax.report.panel import sparkline
from gptjax.training.lr_range import Suggestion, measure, suggest

PAGE_FILE = "lr_find.html"
WIDTH = 60


def run_lr_find(config: Config, options: LrFindConfig) -> int:
    """Prints and draws the loss over rising learning rates, and a suggestion.

    Raises:
        UserError: The config or its data cannot be used, or the loss does not fall.
    """
    path = Path(options.out or PAGE_FILE).expanduser()
    check_writable("out", path)
    compile_cache.start(config.cache_dir)
    with tempfile.TemporaryDirectory(prefix="gptjax-lr-find-") as folder:
        rates, losses = measure(config, Path(folder) / "run", options.low, options.high, options.steps)
    found = suggest(rates, losses, options.steps)
    print(f"rate        {rates[0]:.1e} {sparkline(losses, WIDTH)} {rates[-1]:.1e}")
    for line in describe(found, config):
        print(line)
    write_atomic(path, render(rates, losses, describe(found, config)).encode())
    print(path)
    return 0


def describe(found: Suggestion, config: Config) -> list[str]:
    """The result as log lines."""
    end = "did not rise up to the last rate" if found.diverged is None else f"rose above rate {found.diverged:.1e}"
    return [
        f"loss        falls fastest at rate {found.steepest:.1e}, is lowest at {found.lowest:.1e}, {end}",
        f"suggestion  --optim.learning_rate {found.rate:g} (the config has {config.optim.learning_rate:g})",
    ]


def render(rates: list[float], losses: list[float], lines: list[str]) -> str:
    """The page with the chart."""
    data = {
        "runs": [{"name": "", "steps": {"learning rate": rates, "loss": losses}, "evaluations": {"learning rate": []}}],
        "charts": [
            {
                "title": "Loss over rising learning rates",
                "unit": "nats per token",
                "series": [{"run": 0, "table": "steps", "column": "loss"}],
            }
        ],
        "marks": [],
        "axes": ["learning rate"],
        "logX": True,
    }
    return chart_page("Learning-rate range test", lines, data)
