"""Advantages of both roles against values worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.learn.advantages import Advantages, GroupRewards, advantages
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.spec import LossSpec
from specs import hyper

PENALTY = -1.5
NAN = float("nan")
TASK = [[1.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
QUALITY = [[7.0, 3.0, 5.0, 5.0], [2.0, 4.0, 6.0, 0.0], [1.0, 2.0, 3.0, 6.0]]


def compute(
    task: list[list[float]] | np.ndarray,
    quality: list[list[float]] | np.ndarray,
    valid_query: list[int] | np.ndarray | None = None,
    valid_answer: list[list[int]] | np.ndarray | None = None,
    use_quality: bool = True,
) -> Advantages:
    """Advantages as numpy arrays; all valid unless said otherwise."""
    shape = np.shape(task)
    rewards = GroupRewards(
        task=jnp.asarray(task, jnp.float32),
        quality=jnp.asarray(quality, jnp.float32),
        valid_query=jnp.ones(shape[0], bool) if valid_query is None else jnp.asarray(valid_query, bool),
        valid_answer=jnp.ones(shape, bool) if valid_answer is None else jnp.asarray(valid_answer, bool),
    )
    scalars = hyper(LossConfig(invalid_query_penalty=PENALTY))
    out = jax.jit(advantages, static_argnames="spec")(rewards, LossSpec(use_quality=use_quality), scalars)
    return Advantages(*(np.asarray(x) for x in out))


def close(actual: np.ndarray, expected: object) -> None:
    np.testing.assert_allclose(actual, np.asarray(expected), atol=1e-6, rtol=1e-6)


def test_lsp_by_hand() -> None:
    out = compute(TASK, QUALITY)
    # R + R_Q: 8 3 5.5 5.5 (mean 5.5), 2 4 6 1 (3.25), 2 3 4 7 (4)
    close(out.solver_reward, [[8, 3, 5.5, 5.5], [2, 4, 6, 1], [2, 3, 4, 7]])
    close(out.solver, [[2.5, -2.5, 0, 0], [-1.25, 0.75, 2.75, -2.25], [-2, -1, 0, 3]])
    # V 0.5 0.25 1, V_Q 5 3 3: -V + V_Q = 4.5 2.75 2, mean 9.25 / 3
    close(out.challenger_reward, [4.5, 2.75, 2])
    close(out.challenger, [4.5 - 9.25 / 3, 2.75 - 9.25 / 3, 2 - 9.25 / 3])
    assert out.answer_counts.all() and out.query_counts.all()


def test_lsp_zero_by_hand() -> None:
    out = compute(TASK, QUALITY, use_quality=False)
    close(out.solver_reward, TASK)
    close(out.solver, [[0.5, -0.5, 0, 0], [-0.25, -0.25, -0.25, 0.75], [0, 0, 0, 0]])
    close(out.challenger_reward, [-0.5, -0.25, -1])
    close(out.challenger, [-0.5 + 1.75 / 3, -0.25 + 1.75 / 3, -1 + 1.75 / 3])


def test_lsp_zero_never_reads_quality() -> None:
    expected = compute(TASK, QUALITY, use_quality=False)
    out = compute(TASK, np.full((3, 4), NAN), use_quality=False)
    for got, want in zip(out, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_no_division_by_a_standard_deviation() -> None:
    once, tenfold = compute(TASK, QUALITY), compute(10 * np.asarray(TASK), 10 * np.asarray(QUALITY))
    close(tenfold.solver, 10 * once.solver)
    close(tenfold.challenger, 10 * once.challenger)


def test_invalid_query_is_penalised_and_its_answers_are_not_learned_from() -> None:
    task, quality = np.asarray(TASK), np.asarray(QUALITY)
    task[1], quality[1] = NAN, NAN
    out = compute(task, quality, valid_query=[1, 0, 1])
    close(out.solver_reward[1], [0, 0, 0, 0])
    close(out.solver, [[2.5, -2.5, 0, 0], [0, 0, 0, 0], [-2, -1, 0, 3]])
    np.testing.assert_array_equal(out.answer_counts, [[True] * 4, [False] * 4, [True] * 4])
    # the penalty is one of the three rewards of the Challenger's mean: (4.5 - 1.5 + 2) / 3
    close(out.challenger_reward, [4.5, PENALTY, 2])
    close(out.challenger, [4.5 - 5 / 3, PENALTY - 5 / 3, 2 - 5 / 3])
    assert out.query_counts.all()


def test_masked_answers_leave_the_means_of_the_others() -> None:
    task, quality = np.asarray(TASK), np.asarray(QUALITY)
    task[0, 1], quality[0, 1], quality[0, 3] = NAN, NAN, np.inf
    valid = [[1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    out = compute(task, quality, valid_answer=valid)
    # query 0 keeps 8 and 5.5: mean 6.75; V = 0.75, V_Q = 6
    close(out.solver[0], [1.25, 0, -1.25, 0])
    close(out.solver_reward[0], [8, 0, 5.5, 0])
    close(out.challenger_reward, [5.25, 2.75, 2])
    close(out.challenger, np.array([5.25, 2.75, 2]) - 10 / 3)
    np.testing.assert_array_equal(out.answer_counts, np.asarray(valid, bool))


def test_query_with_one_valid_answer_teaches_the_challenger_only() -> None:
    task = np.asarray(TASK)
    task[2, 1:] = NAN
    out = compute(task, QUALITY, valid_answer=[[1] * 4, [1] * 4, [1, 0, 0, 0]])
    close(out.solver[2], [0, 0, 0, 0])
    close(out.solver_reward[2], [2, 0, 0, 0])
    np.testing.assert_array_equal(out.answer_counts[2], [True, False, False, False])
    # V = 1, V_Q = 1 from that answer
    close(out.challenger_reward, [4.5, 2.75, 0])
    close(out.challenger, np.array([4.5, 2.75, 0]) - 7.25 / 3)
    assert out.query_counts.all()


def test_valid_query_without_valid_answer_drops_out_of_the_challengers_mean() -> None:
    task, quality = np.asarray(TASK), np.asarray(QUALITY)
    task[0], quality[0] = NAN, NAN
    out = compute(task, quality, valid_answer=[[0] * 4, [1] * 4, [1] * 4])
    close(out.solver[0], [0, 0, 0, 0])
    close(out.challenger_reward, [0, 2.75, 2])
    close(out.challenger, [0, 0.375, -0.375])  # mean over two queries, not three
    np.testing.assert_array_equal(out.query_counts, [False, True, True])


def test_invalid_query_without_valid_answer_still_gets_its_penalty() -> None:
    out = compute(TASK, QUALITY, valid_query=[0, 1, 1], valid_answer=[[0] * 4, [1] * 4, [1] * 4])
    close(out.challenger_reward, [PENALTY, 2.75, 2])
    close(out.challenger, np.array([PENALTY, 2.75, 2]) - 3.25 / 3)
    assert out.query_counts.all()


def test_all_queries_invalid_teaches_nothing_but_all_count() -> None:
    out = compute(np.full((3, 4), NAN), np.full((3, 4), NAN), valid_query=[0, 0, 0])
    close(out.challenger, [0, 0, 0])
    close(out.challenger_reward, [PENALTY] * 3)
    close(out.solver, np.zeros((3, 4)))
    assert out.query_counts.all() and not out.answer_counts.any()


def test_nothing_scored_at_all_is_all_zero() -> None:
    out = compute(np.full((3, 4), NAN), np.full((3, 4), NAN), valid_answer=np.zeros((3, 4)))
    for values in (out.solver, out.challenger, out.solver_reward, out.challenger_reward):
        np.testing.assert_array_equal(values, 0)
    assert not out.query_counts.any() and not out.answer_counts.any()


@pytest.mark.parametrize("use_quality", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_random_masks_against_plain_loops_and_zero_sums(seed: int, use_quality: bool) -> None:
    rng = np.random.default_rng(seed)
    n, g = rng.integers(2, 9), rng.integers(2, 9)
    task, quality = rng.normal(size=(n, g)), rng.uniform(0, 7, (n, g))
    valid_query, valid_answer = rng.random(n) < 0.7, rng.random((n, g)) < (0.3 if seed % 2 else 0.9)
    task[~valid_answer], quality[~valid_query] = NAN, NAN
    out = compute(task, quality, valid_query, valid_answer, use_quality)

    solver, rewards = np.zeros((n, g)), {}
    for i in range(n):
        answers = [j for j in range(g) if valid_query[i] and valid_answer[i, j]]
        total = {j: task[i, j] + (quality[i, j] if use_quality else 0) for j in answers}
        if len(answers) >= 2:
            for j in answers:
                solver[i, j] = total[j] - sum(total.values()) / len(answers)
        if not valid_query[i]:
            rewards[i] = PENALTY
        elif answers:
            rewards[i] = sum(total[j] - 2 * task[i, j] for j in answers) / len(answers)
    challenger = np.zeros(n)
    for i, reward in rewards.items():
        challenger[i] = reward - sum(rewards.values()) / len(rewards)
    np.testing.assert_allclose(out.solver, solver, atol=1e-5)
    np.testing.assert_allclose(out.challenger, challenger, atol=1e-5)
    np.testing.assert_array_equal(out.query_counts, [i in rewards for i in range(n)])

    np.testing.assert_allclose(out.solver.sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(out.challenger.sum(), 0, atol=1e-5)
    assert seed % 2 or np.abs(out.solver).max() > 0.1


@pytest.mark.parametrize("shapes", [((3,), (3,), (3,)), ((3, 4), (3, 5), (3,)), ((3, 4), (3, 4), (4,))])
def test_wrong_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    task, quality, valid_query = (jnp.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match="expected"):
        advantages(GroupRewards(task, quality, valid_query > 0, task > 0), LossSpec(), hyper())
