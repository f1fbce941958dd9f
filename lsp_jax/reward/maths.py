"""The maths reward: whether an answer's final result equals that of the data row, according to math-verify.

Its parser may evaluate its input, so it runs in a sandbox, which is reused for many answers. The result is taken from
the last \\boxed{}, else after the last ####, else from the end of the text, where math-verify searches for a formula
and then for the last number.
"""

from __future__ import annotations

import logging

import numpy as np

from lsp_jax.core.errors import InputError
from lsp_jax.reward.base import DataRows, HostReward, RewardOutput
from lsp_jax.reward.execution.pool import Outcome, Workers
from lsp_jax.reward.execution.sandbox import sandboxed

SECONDS = 20.0  # time limit of one comparison; math-verify's own limit is 5 for each of its steps
_PACKAGES = ("math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath")
logger: logging.Logger = logging.getLogger(__name__)


def check_rows(rows: DataRows, field: str = "answer") -> None:
    """Raises InputError for a row whose `field` is not a string."""
    if not rows:
        raise InputError("maths reward rows", None, "needs a data set with answers; self-play has none")
    for place, row in enumerate(rows):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            remedy = "must be the correct answer, a string as in GSM8K (#### 7) or MATH (\\boxed{7})"
            raise InputError(f"maths reward rows[{place}].{field}", value, remedy)


def check_maths(workers: Workers) -> None:
    """Starts math-verify in the sandbox once.

    Raises:
        InputError: bwrap or the package is missing, or it does not start in the sandbox.
    """
    outcome = workers.ready(sandboxed("maths", _PACKAGES))
    if outcome.reply is None:
        raise InputError("maths reward", "math-verify", f"did not start in the sandbox: {outcome.failure}")


def maths_reward(
    weight: float = 1.0,
    name: str = "maths",
    workers: Workers | None = None,
    field: str = "answer",
    timeout: float = SECONDS,
) -> HostReward:
    """Returns a task reward: 1 if the answer's result equals that in the row's `field`, else 0.

    An answer is masked when its comparison exceeds `timeout` seconds or its child process dies, and when the row's own
    result cannot be parsed. Answers that math-verify cannot parse within its own time limit score 0. Check the rows
    with `check_rows` and the sandbox with `check_maths` before long work.

    Raises:
        InputError: no bwrap on PATH, or math-verify is not installed.
    """
    pool, program = workers or Workers(), sandboxed("maths", _PACKAGES)

    def score(queries: list[str], answers: list[list[str]], rows: DataRows = ()) -> RewardOutput:
        check_rows(rows, field)
        shape = (len(queries), len(answers[0]))
        items = [
            {"gold": row[field], "answer": answer, "seconds": timeout}
            for row, group in zip(rows, answers, strict=True)
            for answer in group
        ]
        outcomes = pool.run(program, items, timeout)
        failures = [why for why in map(_failure, outcomes) if why]
        if failures:
            logger.warning("reward %s: %d of %d answers are masked: %s", name, len(failures), len(items), failures[0])
        values = np.array([outcome.reply is not None and outcome.reply.get("equal") is True for outcome in outcomes])
        valid = np.array([not _failure(outcome) for outcome in outcomes])
        return RewardOutput(values.astype(np.float32).reshape(shape), valid.reshape(shape), np.ones(shape[0], bool))

    return HostReward(name, "task", weight, score)


def _failure(outcome: Outcome) -> str:
    """Returns why this answer has no score; empty if it has one."""
    if outcome.reply is None:
        return outcome.failure
    return "" if outcome.reply.get("gold") is True else "the row's own result cannot be parsed"
