"""Intervals, pass@k and win rates against other ways to the same numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from lsp_jax.evaluate import statistics
from lsp_jax.evaluate.statistics import bootstrap, length_controlled, mean_interval, pass_at_k, wilson, win_rate


@pytest.mark.parametrize(("right", "number"), [(0, 10), (3, 10), (10, 10), (412, 936)])
def test_wilson_solves_its_equation(right: int, number: int):
    """The ends are where the share is Z standard deviations away: (share - p)^2 = Z^2 p (1 - p) / n."""
    found = wilson(right, number)
    for p in (found.low, found.high):
        left, deviation = (right / number - p) ** 2, statistics.Z**2 * p * (1 - p) / number
        assert math.isclose(left, deviation, abs_tol=1e-12)
    assert 0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    # by hand: z = 1.96, n = 10 and 900
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (450, 900, 0.4674, 0.5326), (10, 10, 0.7225, 1.0)],
)
def test_wilson_by_hand(right: int, number: int, low: float, high: float):
    assert wilson(right, number)[1:3] == pytest.approx((low, high), abs=1e-3)


def test_no_cases():
    assert math.isnan(wilson(0, 0).value) and wilson(0, 0).as_dict()["value"] is None
    assert math.isnan(mean_interval([]).value)


@pytest.mark.parametrize("number", [1, 4, 6])
def test_pass_at_k_is_the_mean_over_all_choices(number: int):
    for right, k in itertools.product(range(number + 1), range(1, number + 1)):
        marks = [place < right for place in range(number)]
        chosen = [any(some) for some in itertools.combinations(marks, k)]
        assert math.isclose(pass_at_k(number, right, k), sum(chosen) / len(chosen))


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_refuses(k: int):
    with pytest.raises(ValueError, match="must be from 1"):
        pass_at_k(3, 1, k)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(400, lambda picked: float(values[picked].mean()))
    half = 1.96 * values.std(ddof=1) / 20
    assert abs(low - (values.mean() - half)) < 0.02 and abs(high - (values.mean() + half)) < 0.02
    assert (low, high) == bootstrap(400, lambda picked: float(values[picked].mean()))


def test_win_rate_by_hand():
    """Two wins (one in a single order only), a tie, a loss."""
    found = win_rate([1.0, 0.75, 0.5, 0.0], [0, 0, 0, 0])
    assert found.win_rate.value == 0.5625 and (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.wins_only.value == 0.5 and found.win_rate.number == 4
    # without any difference in length there is nothing to control: the ridge alone pulls it towards a half
    assert abs(found.length_controlled.value - 0.5625) < 1e-3


def reference_fit(scores: np.ndarray, extra: np.ndarray) -> float:
    """The same objective, minimised by scipy without its gradient."""
    features = np.stack([np.ones(len(scores)), np.tanh(extra / extra.std(ddof=1))], axis=1)

    def loss(weights: np.ndarray) -> float:
        logits = features @ weights
        nll = np.logaddexp(0, logits) - scores * logits
        return float(nll.sum() + statistics.RIDGE / 2 * weights @ weights)

    best = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    return float(1 / (1 + np.exp(-best.x[0])))


@pytest.mark.parametrize("seed", range(3))
def test_length_controlled_against_scipy(seed: int):
    rng = np.random.default_rng(seed)
    extra = rng.normal(200, 300, 150)
    chance = 1 / (1 + np.exp(-(-0.4 + 0.9 * np.tanh(extra / 300))))
    scores = np.round(rng.binomial(2, chance) / 2, 2)
    assert abs(length_controlled(scores, extra) - reference_fit(scores, extra)) < 1e-5


def test_length_is_controlled_for():
    """Longer answers win because they are longer: at equal length neither side is ahead."""
    rng = np.random.default_rng(0)
    extra = rng.normal(400, 300, 4000)
    scores = rng.binomial(1, 1 / (1 + np.exp(-2 * np.tanh(extra / extra.std())))).astype(float)
    found = win_rate(scores[:800].tolist(), extra[:800].tolist())
    assert found.win_rate.value > 0.7
    assert found.length_controlled.low < 0.5 < found.length_controlled.high


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_side_that_wins_everything_is_a_finite_fit(value: float):
    found = length_controlled(np.full(50, value), np.arange(50.0))
    assert abs(found - value) < 0.1 and 0 < found < 1


@pytest.mark.parametrize("number", [1, 2, 8, 164, 1319])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_none_and_all_right_have_the_interval_of_scipy(number: int, right: float):
    """Not one without width: with no right answer of 8, a share of 32 % is still possible."""
    expected = stats.binomtest(int(right) * number, number).proportion_ci(0.95, "wilson")
    found = mean_interval([right] * number)
    assert found[1:3] == pytest.approx((expected.low, expected.high), abs=1e-7) and found.value == right
    assert found.low == 0 if right == 0 else found.high == 1
    assert found.high - found.low > 0.9 * min(1.0, 3.84 / (number + 3.84))


def test_an_interval_without_width_is_no_interval():
    """By hand: Wilson's at a half of 4 is a half +- 1.96 sqrt(1/16 + 3.84/64) / (1 + 3.84/4)."""
    half = 1.96 * math.sqrt(1 / 16 + 3.8416 / 64) / (1 + 3.8416 / 4)
    assert mean_interval([0.5] * 4)[:3] == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-4)
    assert mean_interval([0.3])[1:3] == pytest.approx(wilson(0.3, 1)[1:3]) and mean_interval([0.3]).low < 0.05
    assert mean_interval([1, 0, 0, 0]) == wilson(1, 4), "a share"
    varied = [0.2, 0.4, 0.6, 0.8] * 10
    low, high = bootstrap(40, lambda picked: float(np.asarray(varied)[picked].mean()))
    assert mean_interval(varied) == (pytest.approx(0.5), low, high, 40)


@pytest.mark.parametrize(("score", "low", "high"), [(1.0, 0.7225, 1.0), (0.0, 0.0, 0.2775), (0.5, 0.2366, 0.7634)])
def test_a_win_rate_of_equal_scores_has_an_honest_interval(score: float, low: float, high: float):
    """By hand: Wilson's of 10 at z = 1.96; ties in all orders are no certainty either."""
    found = win_rate([score] * 10, list(range(10)))
    assert found.win_rate[:3] == pytest.approx((score, low, high), abs=1e-3)
    assert found.wins_only[1:3] == pytest.approx((low, high) if score == 1 else (0.0, 0.2775), abs=1e-3)
    controlled = found.length_controlled
    assert controlled.low <= controlled.value <= controlled.high and controlled[1:3] == pytest.approx(
        (low, high), abs=0.01
    )
