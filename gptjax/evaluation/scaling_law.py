"""The loss as a function of parameters N and tokens D, fitted to small runs: L(N, D) = E + A / N^alpha + B / D^beta
(Hoffmann et al., arXiv:2203.15556, section 3.3 and appendix D.3).

Shape suffixes: R run, S start of the optimizer.
"""

import dataclasses
import itertools
from typing import Any, cast

import numpy as np
from scipy.optimize import OptimizeResult, least_squares

HUBER = 1e-3
"""Residuals of the logarithm above this have a linear penalty, as in the paper."""
SCALES = (1.0, 0.03, HUBER)
"""Thresholds of the Huber loss, one after the other: with the last alone, the optimizer can miss the minimum."""
STARTS = 5
"""Points of the paper's grid that the optimizer starts from: those with the lowest objective."""


@dataclasses.dataclass(frozen=True)
class Law:
    """Coefficients of a law."""

    E: float
    """Loss of an infinite model on infinite data, in nats."""
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, n, d):
        """Predicted loss in nats for numbers of parameters and tokens, which may be arrays."""
        return self.E + self.A / np.power(n, self.alpha) + self.B / np.power(d, self.beta)

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss among those with 6 N D = `flops` (equation 4 of the paper)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        n = ratio * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return n, flops / 6 / n


def fit(n_R: np.ndarray, d_R: np.ndarray, loss_R: np.ndarray) -> Law:
    """Fits a law to runs: the sum of the Huber losses of differences of logarithms, minimized from several starts."""
    # The paper's grid: a, alpha, b, beta, e.
    a, exponents, e = np.arange(0, 30, 5), np.arange(0, 2.5, 0.5), np.arange(-1, 1.5, 0.5)
    grid_S5 = np.array(list(itertools.product(a, exponents, a, exponents, e)), np.float64)
    logs = np.log(n_R), np.log(d_R), np.log(loss_R)
    sizes_SR = np.abs(_residuals(grid_S5.T[..., None], *logs))
    return _best(grid_S5[np.argsort(sizes_SR.sum(axis=1))[:STARTS]], *logs)


def bootstrap(n_R: np.ndarray, d_R: np.ndarray, loss_R: np.ndarray, law: Law, count: int, seed: int) -> list[Law]:
    """Fits `count` laws, each to as many runs drawn with replacement; all start from `law`."""
    chance, laws = np.random.default_rng(seed), []
    start = np.array([[np.log(law.A), law.alpha, np.log(law.B), law.beta, np.log(law.E)]])
    while len(laws) < count:
        drawn_R = chance.integers(0, len(n_R), len(n_R))
        if min(len(np.unique(n_R[drawn_R])), len(np.unique(d_R[drawn_R]))) >= 3:
            laws.append(_best(start, np.log(n_R[drawn_R]), np.log(d_R[drawn_R]), np.log(loss_R[drawn_R])))
    return laws


def interval(values) -> tuple[float, float]:
    """The central 95 % of bootstrapped values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _best(starts_S5: np.ndarray, *logs: np.ndarray) -> Law:
    found, slopes = [], cast(Any, _slopes)  # SciPy's types know only names here
    for start in starts_S5:
        one = OptimizeResult(x=start)
        for scale in SCALES:
            one = least_squares(_residuals, one.x, slopes, loss="huber", f_scale=scale, args=logs, max_nfev=200)
        found.append(one)
    a, alpha, b, beta, e = min(found, key=lambda one: one.cost).x
    return Law(E=float(np.exp(e)), A=float(np.exp(a)), alpha=float(alpha), B=float(np.exp(b)), beta=float(beta))


def _terms(x, n_R: np.ndarray, d_R: np.ndarray) -> np.ndarray:
    """Logarithms of the three terms; `n_R` and `d_R` are logarithms, `x` is a, alpha, b, beta, e."""
    a, alpha, b, beta, e = x
    return np.stack(np.broadcast_arrays(a - alpha * n_R, b - beta * d_R, e))


def _residuals(x, n_R: np.ndarray, d_R: np.ndarray, loss_R: np.ndarray) -> np.ndarray:
    """Predicted minus measured logarithms of the loss."""
    return np.logaddexp.reduce(_terms(x, n_R, d_R), axis=0) - loss_R


def _slopes(x, n_R: np.ndarray, d_R: np.ndarray, loss_R: np.ndarray) -> np.ndarray:
    """Derivatives of the residuals, `[R, 5]`."""
    terms_3R = _terms(x, n_R, d_R)
    of_a, of_b, of_e = np.exp(terms_3R - np.logaddexp.reduce(terms_3R, axis=0))
    return np.stack([of_a, -of_a * n_R, of_b, -of_b * d_R, of_e], axis=1)
