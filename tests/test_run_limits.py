"""The least seconds of each phase against a calculation by hand."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.learn.losses import LossConfig
from lsp_jax.model.llama import params_shape
from lsp_jax.perf.chips import CHIPS
from lsp_jax.perf.roofline import Rates, least_seconds, rates, shares, weights
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.text.prompts import PlayPrompts, TokenTemplate
from specs import game_spec
from tiny import tiny_config

MODEL = tiny_config()  # two layers of 32 x (4 * 8 * 2 + 2 * 8 * 2 + 3 * 48) = 7680 weights, a head of 296 x 32 = 9472
WEIGHTS = 2 * 7680 + 9472
METRICS = {
    "solver/prompts/mean_length": 10.0,
    "solver/completions/mean_length": 5.0,
    "solver/completions/max_length": 7.0,
    "challenger/completions/mean_length": 3.0,
    "challenger/completions/max_length": 4.0,
}


def game(**loss: Any) -> GameSpec:
    """2 queries of which each has 3 answers, a Challenger's prompt of 20 tokens, computed with in bfloat16."""
    prompts = PlayPrompts(tuple(range(20)), (), TokenTemplate((), ()), ())
    play = PlayConfig(num_queries=2, num_generations=3)
    return game_spec(MODEL, prompts, compute_dtype="bfloat16", play=play, loss=LossConfig(**loss))[0]


def test_weights_are_those_of_the_model() -> None:
    shapes = params_shape(MODEL)
    matrices = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.size > 32 * 2)
    assert weights(MODEL) == matrices == WEIGHTS


def test_operations_by_hand() -> None:
    """Memory without end: 2 * 10 + 6 * 5 tokens of the Solver, 20 + 2 * 3 of the Challenger, on two devices."""
    found = least_seconds(game(), METRICS, Rates(1000.0, 1e30), 2)
    once = 2 * WEIGHTS / 1000 / 2
    expected = {"challenge": 26 * once, "solve": 50 * once, "reference": 76 * once, "update": 3 * 76 * once}
    assert found == pytest.approx(expected)
    two = least_seconds(game(num_iterations=2), METRICS, Rates(1000.0, 1e30), 2)
    assert two["update"] == pytest.approx(2 * expected["update"])


def test_bytes_by_hand() -> None:
    """Operations for nothing: the weights once a column of the longest row, two bytes each."""
    found = least_seconds(game(), METRICS, Rates(1e30, 1000.0), 1)
    assert found["solve"] == pytest.approx(7 * 2 * WEIGHTS / 1000)
    assert found["challenge"] == pytest.approx(4 * 2 * WEIGHTS / 1000)


def test_without_a_challenger() -> None:
    alone = {name: value for name, value in METRICS.items() if name.startswith("solver")}
    found = least_seconds(game(alpha_challenger=0.0), alone, Rates(1000.0, 1e30), 1)
    assert set(found) == {"solve", "reference", "update"}
    assert found["reference"] == pytest.approx(50 * 2 * WEIGHTS / 1000)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("TPU v5p", "v5p"), ("NVIDIA H100 80GB HBM3", "h100")],
)
def test_published_rates(kind: str, chip: str) -> None:
    assert rates(kind) == Rates(CHIPS[chip].flops, CHIPS[chip].bandwidth)


def test_shares_are_least_over_taken() -> None:
    times = {f"time/{phase}": 2.0 for phase in ("challenge", "solve", "reference", "update")}
    found = shares(game(), METRICS | times, jax.devices()[:1])
    least = least_seconds(game(), METRICS, rates(jax.devices()[0].device_kind), 1)
    assert found == pytest.approx({f"limit/{phase}": seconds / 2 for phase, seconds in least.items()})
    assert rates(jax.devices()[0].device_kind).bandwidth > 1e8  # measured: any memory does 0.1 GB/s
