"""The maths reward: whether an answer's final result equals that of the data row.

`lsp_jax.reward.answers` finds, reads and compares the results. sympy may take very long over a model's expression, so
this runs in a sandbox, which is reused for many answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from lsp_jax.core.errors import InputError, shown
from lsp_jax.reward.base import DataRows, HostReward, RewardOutput
from lsp_jax.reward.execution.pool import Outcome, Workers
from lsp_jax.reward.execution.sandbox import sandboxed

SECONDS = 20.0  # time limit of one comparison; the sandbox's own is 5, after which the results are not equal
NAMED = 5  # unreadable golds named in a message
_PACKAGES = ("lsp_jax.reward.answers", "sympy", "mpmath")
_FORMS = "as in GSM8K (#### 7), MATH (\\boxed{7}) or alone (7)"
logger: logging.Logger = logging.getLogger(__name__)


def check_rows(rows: DataRows, field: str = "answer") -> None:
    """Raises InputError for a row whose `field` is not a string."""
    if not rows:
        raise InputError("maths reward rows", None, "needs a data set with answers; self-play has none")
    for place, row in enumerate(rows):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"maths reward rows[{place}].{field}", value, f"must be the correct answer, {_FORMS}")


def check_golds(golds: Sequence[str], places: Sequence[str], workers: Workers) -> None:
    """Reads every gold as the reward will, before the run.

    Args:
        golds: the correct answers.
        places: the origin of each, such as FILE:LINE, for the message.

    Raises:
        InputError: some cannot be read; the first ones are named with their place and text.
    """
    different = dict.fromkeys(golds)
    items = [{"gold": gold, "seconds": SECONDS} for gold in different]
    outcomes = dict(zip(different, workers.run(sandboxed("maths", _PACKAGES), items, SECONDS), strict=True))
    unread = [(place, gold) for place, gold in zip(places, golds, strict=True) if _failure(outcomes[gold])]
    if unread:
        named = "; ".join(f"{place} {shown(gold, 60)}" for place, gold in unread[:NAMED])
        rest = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
        remedy = f"cannot be read as maths answers: {named}{rest}; each must be a result and nothing else, {_FORMS}"
        raise InputError("maths reward answers", f"{len(unread)} of {len(golds)}", remedy)


def check_maths(workers: Workers) -> None:
    """Starts the comparison in the sandbox once.

    Raises:
        InputError: bwrap or sympy is missing, or it does not start in the sandbox.
    """
    outcome = workers.ready(sandboxed("maths", _PACKAGES))
    if outcome.reply is None:
        raise InputError("maths reward", "sympy", f"did not start in the sandbox: {outcome.failure}")


def maths_reward(
    weight: float = 1.0,
    name: str = "maths",
    workers: Workers | None = None,
    field: str = "answer",
    timeout: float = SECONDS,
) -> HostReward:
    """Returns a task reward: 1 if the answer's result equals that in the row's `field`, else 0.

    An answer is masked when its comparison exceeds `timeout` seconds or its child process dies, and when the row's own
    result cannot be read. Answers over which sympy takes more than its own time limit score 0. Check the rows with
    `check_rows` and `check_golds`, and the sandbox with `check_maths`, before long work.

    Raises:
        InputError: no bwrap on PATH, or sympy is not installed.
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
