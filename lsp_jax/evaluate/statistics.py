"""Statistics in float64 on the host: confidence intervals, pass@k, win rates, length-controlled win rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
Z = 1.959964
"""Normal quantile of a two-sided 95 % interval."""
RIDGE = 0.01
"""Ridge penalty of the length-controlled fit, finite even if one side always wins (1 / C with AlpacaEval's C = 100)."""


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    number: int
    """Number of independent cases."""

    def as_dict(self, digits: int = 4) -> dict[str, Any]:
        """Returns rounded values for a result file, with None for NaN."""
        rounded = [None if math.isnan(x) else round(x, digits) for x in (self.value, self.low, self.high)]
        return {**dict(zip(("value", "low", "high"), rounded, strict=True)), "number": self.number}


def wilson(right: float, number: int) -> Interval:
    """Returns the proportion `right` / `number` with Wilson's score interval (Wilson 1927)."""
    if not number:
        return Interval(math.nan, 0.0, 1.0, 0)
    share, spread = right / number, Z * Z / number
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(share, low if share > 0 else 0.0, high if share < 1 else 1.0, number)


def pass_at_k(number: int, right: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k for a problem with `right` correct answers among `number`.

    1 - C(number - right, k) / C(number, k), as in Chen et al. 2021, Equation 1. ValueError unless 1 <= k <= number.
    """
    if not 1 <= k <= number:
        raise ValueError(f"k = {k} must be from 1 to the number of answers, {number}")
    return 1.0 - math.comb(number - right, k) / math.comb(number, k)


def bootstrap(cases: int, figure: Callable[[np.ndarray], float], seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of `figure`, a function of indices into the cases."""
    rng = np.random.default_rng(seed)
    drawn = [figure(rng.integers(0, cases, cases)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Returns the mean of values in [0, 1] (of problems, instructions) with an interval for that of many such cases.

    Wilson's for values of 0 and 1, which are a share, and where all values are equal: resampling the same value would
    give an interval without width. Otherwise a bootstrap over the values.
    """
    array = np.asarray(values, np.float64)
    if not len(array):
        return Interval(math.nan, math.nan, math.nan, 0)
    if np.isin(array, (0.0, 1.0)).all() or (array == array[0]).all():
        return wilson(float(array.sum()), len(array))
    return Interval(float(array.mean()), *bootstrap(len(array), lambda picked: float(array[picked].mean())), len(array))


class WinRate(NamedTuple):
    """Win rates of a model against a baseline, over instructions that were judged in both orders."""

    win_rate: Interval
    """Mean score: 1 a win, 1/2 a tie, 0 a loss; both orders of an instruction are averaged first (AlpacaEval's)."""
    wins_only: Interval
    """Fraction of instructions won; a tie is not a win."""
    length_controlled: Interval
    """Win rate that a logistic fit predicts for answers of equal length."""
    wins: int
    ties: int
    losses: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the values for a result file."""
        rates = {name: getattr(self, name).as_dict() for name in ("win_rate", "wins_only", "length_controlled")}
        return {**rates, "wins": self.wins, "ties": self.ties, "losses": self.losses}


def win_rate(scores: Sequence[float], extra_characters: Sequence[float]) -> WinRate:
    """Returns the win rates from `scores` in [0, 1] per instruction, means of both orders: > 1/2 is a win, 1/2 a tie.

    `extra_characters` is the length of the model's answer minus that of the baseline's.
    """
    array, extra = np.asarray(scores, np.float64), np.asarray(extra_characters, np.float64)
    wins, ties = int((array > 0.5).sum()), int((array == 0.5).sum())
    controlled = Interval(math.nan, math.nan, math.nan, len(array))
    if len(array):
        value = length_controlled(array, extra)
        if (array == array[0]).all():  # as in `mean_interval`; the ridge may move the value out of the interval
            _, low, high, _ = wilson(float(array.sum()), len(array))
            low, high = min(low, value), max(high, value)
        else:
            low, high = bootstrap(len(array), lambda picked: length_controlled(array[picked], extra[picked]))
        controlled = Interval(value, low, high, len(array))
    return WinRate(mean_interval(scores), mean_interval(array > 0.5), controlled, wins, ties, len(array) - wins - ties)


def length_controlled(scores: np.ndarray, extra_characters: np.ndarray) -> float:
    """Returns the win rate at equal length: sigmoid(a) of score ~ sigmoid(a + b tanh(extra / its standard deviation)).

    Dubois et al. 2024 without the difficulty of instructions (AlpacaEval's `length_controlled_minimal`), fitted by
    Newton's method with a small ridge in place of its lasso.
    """
    spread = extra_characters.std(ddof=1) if len(extra_characters) > 1 else 0.0
    length = np.tanh(extra_characters / spread) if spread > 0 else np.zeros(len(scores))
    features = np.stack([np.ones(len(scores)), length], axis=1)
    weights = np.zeros(2)
    for _ in range(50):
        chance = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (scores - chance) - RIDGE * weights
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        # far from the optimum only the ridge has curvature, and a full step would overshoot
        weights = weights + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))
