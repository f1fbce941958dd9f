"""The maths reward: is an answer's final result equal to the row's, as the package math-verify sees it?

Its parser may evaluate what it reads, so it runs in a sandbox that stays for many answers. The result is read from the
last \\boxed{}, else after the last ####, else from the end of the text, where math-verify looks for a formula and then
for the last number.
"""

from __future__ import annotations

import logging

import numpy as np

from lsp_jax.core.errors import InputError
from lsp_jax.reward.base import HostReward, RewardOutput, Rows
from lsp_jax.reward.execution.pool import Outcome, Workers
from lsp_jax.reward.execution.sandbox import sandboxed

SECONDS = 20.0  # for one comparison; math-verify itself gives up after 5 for each of its steps
_PACKAGES = ("math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath")
logger: logging.Logger = logging.getLogger(__name__)


def check_rows(rows: Rows, field: str = "answer") -> None:
    """Raises InputError for a row whose `field` is no text."""
    if not rows:
        raise InputError("maths reward rows", None, "needs a data set with answers; self-play has none")
    for place, row in enumerate(rows):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            remedy = "must be the correct answer, a text as in GSM8K (#### 7) or MATH (\\boxed{7})"
            raise InputError(f"maths reward rows[{place}].{field}", value, remedy)


def check_maths(workers: Workers) -> None:
    """Starts the sandboxed math-verify once.

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
    """Task reward: 1 when the answer's result equals that of the row's `field`, else 0.

    An answer is masked when its comparison takes more than `timeout` seconds or its child dies, and when the row's own
    result cannot be read. One that math-verify cannot read, or gives up on after its own 5 seconds, scores 0.
    Check the rows with `check_rows` and the sandbox with `check_maths` before long work.

    Raises:
        InputError: no bwrap on PATH, or math-verify is not installed.
    """
    pool, program = workers or Workers(), sandboxed("maths", _PACKAGES)

    def score(queries: list[str], answers: list[list[str]], rows: Rows = ()) -> RewardOutput:
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
    """Why this answer has no score; empty when it has one."""
    if outcome.reply is None:
        return outcome.failure
    return "" if outcome.reply.get("gold") is True else "the row's own result cannot be read"
