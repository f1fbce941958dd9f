"""The code reward: the program in an answer, run in the sandbox against the tests of the data row.

Rows have the fields of HumanEval or of MBPP (`code_rows`), and the program is the part of the answer that defines what
their tests call (`code_blocks`). Every program gets its own sandbox.

A program passes when the harness, after the last test, returns a nonce drawn for this program, which is in no file,
environment or source that the program can see. So printing, exiting with 0, closing or writing to descriptors, raising
exceptions, and redefining the tests' functions or Python's builtins do not help.

The tests run in the program's process, so a program can still cheat: return objects whose `__eq__` is always true,
patch the standard library, or, if written against this harness, search the interpreter's memory for the nonce. It
cannot leave its sandbox. Programs have one process and one thread.
"""

from __future__ import annotations

import logging
import secrets

import numpy as np

from lsp_jax.reward.base import DataRows, HostReward, RewardOutput
from lsp_jax.reward.code_rows import MAX_PROGRAM, PACKAGES, check_rows, program_and_tests
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.execution.sandbox import sandboxed

SECONDS = 10.0  # time limit of a program with its tests
logger: logging.Logger = logging.getLogger(__name__)


def code_reward(
    weight: float = 1.0, name: str = "code", workers: Workers | None = None, timeout: float = SECONDS
) -> HostReward:
    """Returns a task reward: 1 if the answer's program passes all tests of its row within `timeout` seconds, else 0.

    An answer is masked only if its sandbox did not start. Check the rows with `check_rows` and the sandbox with
    `check_sandbox` before long work.

    Raises:
        InputError: no bwrap on PATH.
    """
    pool, program = workers or Workers(), sandboxed("code", PACKAGES, once=True)

    def score(queries: list[str], answers: list[list[str]], rows: DataRows = ()) -> RewardOutput:
        check_rows(rows)
        shape = (len(queries), len(answers[0]))
        items = []
        for row, group in zip(rows, answers, strict=True):
            for answer in group:
                source, tests = program_and_tests(row, answer)
                source = source if len(source) <= MAX_PROGRAM else "raise SystemExit"
                items.append({"program": source, "tests": tests, "nonce": secrets.token_hex(16), "seconds": timeout})
        outcomes = pool.run(program, items, timeout)
        values = [
            outcome.reply is not None and outcome.reply.get("nonce") == item["nonce"]
            for outcome, item in zip(outcomes, items, strict=True)
        ]
        started = np.array([outcome.started for outcome in outcomes], bool).reshape(shape)
        if not started.all():
            why = next(outcome.failure for outcome in outcomes if not outcome.started)
            logger.warning("reward %s: %d sandboxes did not start: %s", name, (~started).sum(), why)
        return RewardOutput(np.array(values, np.float32).reshape(shape), started, np.ones(shape[0], bool))

    return HostReward(name, "task", weight, score)
