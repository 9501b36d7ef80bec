"""The scaling law: it finds the coefficients that made the losses, its intervals hold them, and the verb reads runs."""

import re

import numpy as np
import pytest
from scipy.optimize import minimize

from gptjax.cli import main
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.evaluation.scaling_law import HUBER, Law, bootstrap, fit, interval
from gptjax.verbs.scaling_fit import read_points
from tests.test_report import Page, write_run
from tests.tiny import CONFIG, replace

PAPER = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)  # arXiv:2203.15556, equation 10
N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(5e7, 5e9, 5), np.geomspace(5e8, 1e11, 5)))


def noisy(seed: int) -> np.ndarray:
    return PAPER.loss(N, D) * np.exp(np.random.default_rng(seed).normal(0, 0.002, N.shape))


def test_coefficients_of_exact_losses_are_found():
    law = fit(N, D, PAPER.loss(N, D))
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(PAPER, name), rel=1e-4)


def test_the_objective_is_that_of_the_paper():
    """Another optimizer on the paper's objective, written out, ends at the same coefficients."""
    losses = noisy(0)
    losses[3] *= 1.2  # a run that went wrong, to which the Huber loss gives little weight

    def objective(x):
        a, alpha, b, beta, e = x
        residual = np.abs(np.log(np.exp(a) / N**alpha + np.exp(b) / D**beta + np.exp(e)) - np.log(losses))
        return 1e6 * np.where(residual <= HUBER, residual**2 / 2, HUBER * (residual - HUBER / 2)).sum()

    law = fit(N, D, losses)
    own = [np.log(law.A), law.alpha, np.log(law.B), law.beta, np.log(law.E)]
    other = minimize(
        objective, own + np.full(5, 0.01), method="Nelder-Mead", options={"maxiter": 20_000, "maxfev": 20_000}
    )
    assert objective(own) <= other.fun * (1 + 1e-6)
    assert law.alpha == pytest.approx(PAPER.alpha, abs=0.03)


def test_intervals_hold_what_made_the_losses_and_narrow_with_less_noise():
    losses = noisy(1)
    law = fit(N, D, losses)
    laws = bootstrap(N, D, losses, law, 50, seed=0)
    low, high = interval([one.alpha for one in laws])
    assert low < PAPER.alpha < high and high - low < 0.1
    exact = bootstrap(N, D, PAPER.loss(N, D), PAPER, 5, seed=0)
    assert interval([one.E for one in exact]) == pytest.approx((PAPER.E, PAPER.E), rel=1e-4)


def test_the_optimum_is_the_lowest_loss_of_all_that_cost_the_same():
    n, d = PAPER.optimum(5.76e23)
    assert 6 * n * d == pytest.approx(5.76e23)
    around = n * np.geomspace(0.5, 2, 101)
    assert np.argmin(PAPER.loss(around, 5.76e23 / 6 / around)) == 50


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of 16 runs of four widths and lengths, whose losses follow a law, and of one that did not finish."""
    folder, law = tmp_path_factory.mktemp("sweep"), Law(E=0.9, A=12.0, alpha=0.3, B=90.0, beta=0.35)
    for width in (16, 32, 64, 128):
        for steps in (100, 200, 400, 800):
            config = replace(CONFIG, model={"n_embd": width}, train={"num_steps": steps})
            n = 2 * 12 * width**2 + 64 * width  # two layers of attention and MLP, and the output projection
            write_run(folder / f"{width}_{steps}", 10, config, loss=lambda _, n=n, s=steps: law.loss(n, s * 128) - 0.5)
            path = folder / f"{width}_{steps}" / "metrics.jsonl"
            text = (
                path.read_text()
                .replace('"step": 10,', f'"step": {steps},')
                .replace('"tokens": 1280,', f'"tokens": {steps * 128},')
            )
            path.write_text(text)
    write_run(folder / "unfinished", 10, replace(CONFIG, train={"num_steps": 999}))
    return folder


def test_the_verb_fits_holds_one_back_and_predicts(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    larger = ["--params", "1e9", "--tokens", "2e10", "--chip", "h100", "--mfu", "0.4", "--price", "2.5"]
    assert main(["scaling-fit", str(runs), "--bootstrap", "20", *larger]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    law = Law(E=0.9, A=12.0, alpha=0.3, B=90.0, beta=0.35)
    for words in (
        "left out    unfinished",
        "runs        15 fitted: 7.168 k to 401.4 k parameters",
        "alpha 0.3 ",
        "held back   128_800",
        "off by +0.00 %",
        f"loss {law.loss(1e9, 2e10):.4f}",
        "1.2e+20 FLOPs (6 N D) = 84.3 hours of one h100 at 40%",  # 6e9 * 2e10 / (0.4 * 989e12) seconds
        "cost 210.65 at 2.5 an hour",
    ):
        assert words in shown, words
    page = Page((tmp_path / "scaling_fit.html").read_text())
    assert len(page.data["runs"]) == 4 and [len(run["evaluations"]["loss"]) for run in page.data["runs"]] == [4] * 4
    assert main(["scaling-fit", str(runs), "--bootstrap", "2", "--hold_out", "16_100"]) == 0
    assert "held back   16_100" in capsys.readouterr().out


def test_mistakes_are_told(runs, tmp_path, capsys):
    assert main(["scaling-fit", str(runs / "16_100")]) == 2
    assert "1 finished runs: a fit needs at least 12" in capsys.readouterr().err
    assert main(["scaling-fit", str(runs), "--hold_out", "16_101"]) == 2
    assert "Did you mean '16_100'?" in capsys.readouterr().err
    assert main(["scaling-fit", str(runs), "--params", "1e9"]) == 2
    assert "give both" in capsys.readouterr().err
    with pytest.raises(UserError, match="neither a run directory"):
        read_points([tmp_path])
    with pytest.raises(UserError, match="16_100: is named twice"):
        read_points([runs, runs / "16_100"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer": TokenizerConfig(kind="bytes")},
            "tokenizer.kind='tiktoken' and 'bytes', so their losses are not",
        ),
        ({"data": {"validation_fraction": 0.5}}, "data.validation_fraction=0.1 and 0.5"),
        ({"task": TaskConfig(kind="classify")}, "two: has task.kind=classify"),
    ],
)
def test_losses_of_other_tokens_are_not_fitted_together(tmp_path, change, message):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", config=replace(CONFIG, **change))
    with pytest.raises(UserError, match=message):
        read_points([tmp_path])


@pytest.mark.parametrize("row", ['"val_loss": null', '"tokens": null'])
def test_a_run_without_a_number_is_left_out(tmp_path, capsys, row):
    path = write_run(tmp_path / "one") / "metrics.jsonl"
    name = row.split(":")[0]
    lines = [re.sub(f"{name}: [^,]*", row, line) for line in path.read_text().splitlines(keepends=True)]
    path.write_text("".join(lines))
    assert read_points([tmp_path]) == []
    assert capsys.readouterr().out.startswith("left out    one: it has no evaluation after its last step, or no finite")
