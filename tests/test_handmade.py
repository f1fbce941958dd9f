"""One hand-made episode: the advantages and the loss of LSP, LSP-Zero and GRPO, each number worked out on paper.

Two queries, two answers each; every completion has two tokens but one of one.

    R    = [[1, 0], [2, 4]]          R_Q  = [[3, 5], [6, 2]]

Every log-probability of the learner is 0.2 above the reference's, so k2 is 0.02 a token; beta is 0.5, alpha_Ch 0.5.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.learn.advantages import Advantages, GroupRewards, advantages
from lsp_jax.learn.batch import Sampled, make_rows
from lsp_jax.learn.logprobs import TokenStatistics
from lsp_jax.learn.losses import LossConfig, policy_loss
from specs import hyper

R = [[1.0, 0.0], [2.0, 4.0]]
R_Q = [[3.0, 5.0], [6.0, 2.0]]
ANSWER_LENGTHS, QUERY_LENGTHS = [2, 2, 2, 1], [2, 2]
LONGEST = 4
"""Columns of a completion, its maximum length."""
BETA, ALPHA = 0.5, 0.5


def played(use_quality: bool, scale_rewards: str = "none") -> Advantages:
    valid = jnp.ones((2, 2), bool)
    loss = LossConfig(use_quality=use_quality, scale_rewards=scale_rewards, invalid_query_penalty=-1.0)  # pyright: ignore
    return advantages(GroupRewards(jnp.asarray(R), jnp.asarray(R_Q), valid[0], valid), loss.spec, hyper(loss))


def role_loss(values: Any, lengths: list[int], scale: float, config: LossConfig, ratio: float = 1.0) -> float:
    """Loss of rows with the advantages `values`, whose tokens are `ratio` times as probable as when played."""
    shape = (len(lengths), LONGEST)
    logprobs = jnp.full(shape, -1.0)
    rows = make_rows(
        prompts=(jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32)),
        sampled=Sampled(jnp.ones(shape, jnp.int32), jnp.asarray(lengths), logprobs, jnp.zeros(shape)),
        advantages_B=jnp.asarray(values).reshape(-1),
        counts_B=jnp.ones(len(lengths), bool),
        scale=scale,
        loss_type=config.loss_type,
    )
    if config.num_iterations > 1:
        rows = rows._replace(old_logprobs=logprobs - np.log(ratio))
    statistics = TokenStatistics(logprobs, jnp.zeros(shape), jnp.zeros(shape))
    return float(policy_loss(statistics, logprobs - 0.2, rows, config.spec, hyper(config))[0])


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_lsp() -> None:
    out = played(use_quality=True)
    # R + R_Q = 4 5 | 8 6, means 4.5 and 7
    close(out.solver, [[-0.5, 0.5], [1.0, -1.0]])
    # V = 0.5, 3 and V_Q = 4, 4: -V + V_Q = 3.5, 1, mean 2.25
    close(out.challenger, [1.25, -1.25])
    config = LossConfig(beta=BETA, alpha_challenger=ALPHA)
    # the ratios are 1 and the advantages add up to 0; what is left is beta * k2: 0.5 * 0.02 * (2 + 2 + 2 + 1) / 4 rows
    close(role_loss(out.solver, ANSWER_LENGTHS, 1.0, config), 0.0175)
    # half of 0.5 * 0.02 * (2 + 2) / 2 rows
    close(role_loss(out.challenger, QUERY_LENGTHS, ALPHA, config), 0.01)


def test_lsp_zero() -> None:
    out = played(use_quality=False)
    close(out.solver, [[0.5, -0.5], [-1.0, 1.0]])
    # -V = -0.5, -3, mean -1.75
    close(out.challenger, [1.25, -1.25])
    # k1 is 0.2 a token: 0.5 * 0.2 * 7 / 4, and half of 0.5 * 0.2 * 4 / 2
    literal = LossConfig(beta=BETA, kl_estimator="k1", alpha_challenger=ALPHA, use_quality=False)
    close(role_loss(out.solver, ANSWER_LENGTHS, 1.0, literal), 0.175)
    close(role_loss(out.challenger, QUERY_LENGTHS, ALPHA, literal), 0.1)


@pytest.mark.full
@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [0.5, -0.5, -1.0, 1.0]),
        # standard deviations with n - 1: of 1 0 it is 0.7071068, of 2 4 it is 1.4142136; 0.0001 is added
        ("group", [0.7070068, -0.7070068, -0.7070568, 0.7070568]),
        # of 1 0 2 4 (mean 1.75): sqrt((0.5625 + 3.0625 + 0.0625 + 5.0625) / 3) = 1.7078251
        ("batch", [0.2927529, -0.2927529, -0.5855058, 0.5855058]),
    ],
)
def test_grpo_advantages(scale: str, expected: list[float]) -> None:
    np.testing.assert_allclose(played(False, scale).solver.reshape(-1), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # gains, one ratio a token: 2 * 0.5, 2 * -0.5, 2 * -1, 1 * 1: -1 in all; beta * KL: 0.5 * 0.02 * 7 = 0.07
        ("token_mean", (1 + 0.07) / 7),
        ("constant_length", (1 + 0.07) / (4 * 4)),
        # one ratio a sequence: 0.5 - 0.5 - 1 + 1 = 0
        ("sequence", 0.07 / 4),
    ],
)
def test_grpo_loss(loss_type: Any, expected: float) -> None:
    config = LossConfig(beta=BETA, loss_type=loss_type, use_quality=False, alpha_challenger=0.0)
    close(role_loss(played(False).solver, ANSWER_LENGTHS, 1.0, config), expected)


@pytest.mark.parametrize(
    ("ratio", "gains", "kl"),
    [
        # 1.5 is cut to 1.3 where the advantage is positive (0.5 and 1), and stays where it is negative (-0.5 and -1):
        # 2 * 1.3 * 0.5 - 2 * 1.5 * 0.5 - 2 * 1.5 * 1 + 1 * 1.3 * 1
        (1.5, -1.9, 1.5),
        # 0.5 stays where the advantage is positive and is raised to 0.9 where it is negative:
        # 2 * 0.5 * 0.5 - 2 * 0.9 * 0.5 - 2 * 0.9 * 1 + 1 * 0.5 * 1
        (0.5, -1.7, 0.5),
    ],
)
def test_grpo_second_inner_epoch(ratio: float, gains: float, kl: float) -> None:
    """Clip range 0.9 to 1.3; k2 is weighted by the ratio, clipped or not."""
    config = LossConfig(
        beta=BETA,
        loss_type="token_mean",
        use_quality=False,
        alpha_challenger=0.0,
        num_iterations=2,
        clip_epsilon=0.1,
        clip_epsilon_high=0.3,
    )
    expected = (-gains + kl * 0.07) / 7
    close(role_loss(played(False).solver, ANSWER_LENGTHS, 1.0, config, ratio), expected)


def test_importance_correction() -> None:
    """The sampler gave each token half of what the learner does: weight 2, cut to 1.6, on gain and k2 alike."""
    config = LossConfig(beta=BETA, loss_type="token_mean", importance_cap=1.6)
    shape = (4, LONGEST)
    drawn = jnp.full(shape, -1.0 - np.log(2))
    rows = make_rows(
        prompts=(jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32)),
        sampled=Sampled(jnp.ones(shape, jnp.int32), jnp.asarray(ANSWER_LENGTHS), drawn, jnp.zeros(shape)),
        advantages_B=played(False).solver.reshape(-1),
        counts_B=jnp.ones(4, bool),
        scale=1.0,
        loss_type="token_mean",
    )
    logprobs = jnp.full(shape, -1.0)
    statistics = TokenStatistics(logprobs, jnp.zeros(shape), jnp.zeros(shape))
    loss, sums = policy_loss(statistics, logprobs - 0.2, rows, config.spec, hyper(config))
    close(loss, 1.6 * (1 + 0.07) / 7)
    close(sums["importance_weight"], 1.6 * 7)
    # half of the mass was cut off, and that is why the sampler's number is larger: no mismatch, no correction
    truncated = rows._replace(behaviour_logprobs=logprobs + np.log(2), log_mass=jnp.full(shape, -np.log(2)))
    loss, sums = policy_loss(statistics, logprobs - 0.2, truncated, config.spec, hyper(config))
    close(loss, (1 + 0.07) / 7)
    close(sums["importance_weight"], 7)
