"""Verifiable rewards: arithmetic answers, and any Python callable, neither of which can hang the run.

A function that is named (`module:function`, `file.py:function`) is called in a worker process. A function object, as a
notebook has it, is called in a thread of its own that is watched. A call that fails or takes too long raises
`WorkerFailure`, which `score_on_host` logs, and masks all of the component's answers of that iteration.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lsp_jax.core.errors import InputError
from lsp_jax.reward.base import HostReward, Kind, RewardOutput, Rows
from lsp_jax.reward.execution.pool import Program, WorkerFailure, Workers, printable
from lsp_jax.reward.execution.user_functions import call_reward, one_line, reward_array

_ARITHMETIC = "lsp_jax.reward.arithmetic:grade"


def arithmetic_reward(weight: float = 1.0, name: str = "arithmetic", workers: Workers | None = None) -> HostReward:
    """Task reward: 1 when the answer's final number equals the query's value, else 0, also for an answer without one.

    A query that `parse_arithmetic` cannot read is not valid. Graded in `workers`, by default a pool of its own.
    """
    pool = workers or Workers(1)

    def score(queries: list[str], answers: list[list[str]], rows: Rows = ()) -> RewardOutput:
        values = _in_worker(pool, _ARITHMETIC, name, queries, answers, ())
        valid_query = np.all(np.isfinite(values), axis=1)
        values[~valid_query] = 0
        return RewardOutput(values, np.ones(values.shape, bool), valid_query)

    return HostReward(name, "task", weight, score)


def callable_reward(
    function: str | Callable[..., Any],
    name: str,
    kind: Kind = "task",
    weight: float = 1.0,
    workers: Workers | None = None,
    timeout: float = 60.0,
) -> HostReward:
    """A reward from a Python function: (N queries, N lists of G answers) -> rewards [N, G].

    A parameter named `rows` gets the data set's N rows as well (none in self-play). Lists of lists, numpy, jax and CPU
    torch arrays of numbers are taken. NaN or infinity masks the answer; all queries are valid.

    A string names the function, as `load_callable` reads it: it runs in `workers` (by default a pool of its own), with
    the pool's time limit, and may leave the process in any state. A function object runs in this process for at most
    `timeout` seconds a call. Python cannot stop a thread: after that the call is left to itself, and until it has ended
    every further one fails at once, so that there is never more than one.

    The score raises InputError for another shape or for what are not numbers, WorkerFailure when the call took too long
    or its process died, and what a function object raises.
    """
    if isinstance(function, str):
        pool, spec = workers or Workers(1), function

        def call(queries: list[str], answers: list[list[str]], rows: Rows) -> np.ndarray:
            return _in_worker(pool, spec, name, queries, answers, rows)
    else:
        watched, direct = _Watched(timeout), function

        def call(queries: list[str], answers: list[list[str]], rows: Rows) -> np.ndarray:
            return watched(lambda: call_reward(direct, name, queries, answers, rows))

    def score(queries: list[str], answers: list[list[str]], rows: Rows = ()) -> RewardOutput:
        values = call(queries, answers, rows)
        return RewardOutput(values, np.isfinite(values), np.ones(len(queries), bool))

    return HostReward(name, kind, weight, score)


def _in_worker(
    pool: Workers,
    spec: str,
    name: str,
    queries: list[str],
    answers: list[list[str]],
    rows: Sequence[Mapping[str, Any]],
) -> np.ndarray:
    """float32 [N, G] of the function that `spec` names, the whole batch in one call.

    Raises:
        InputError: no such function, or it returned another shape or what are not numbers.
        WorkerFailure: it raised, took too long, or its process died.
    """
    item = {"queries": queries, "answers": answers, "rows": [dict(row) for row in rows]}
    (outcome,) = pool.run(_program(spec), [item])
    reply = outcome.reply
    if outcome.refused:
        raise InputError("reward.callable", spec, outcome.refused)
    if reply is None:
        raise WorkerFailure(outcome.failure)
    if "refused" in reply:
        raise InputError("reward.callable", name, printable(str(reply["refused"])))
    if "values" not in reply:
        raise WorkerFailure(f"raised {printable(str(reply.get('raised')))}")
    return reward_array(reply["values"], name, (len(queries), len(answers[0])))


def _program(spec: str) -> Program:
    return Program((sys.executable, "-m", "lsp_jax.reward.execution.worker_main", spec))


class _Watched:
    """Calls functions in a daemon thread, one at a time."""

    def __init__(self, seconds: float):
        if not 0 < seconds < float("inf"):
            raise InputError("reward.callable timeout", seconds, "must be a number of seconds above 0")
        self.seconds = seconds
        self.thread: threading.Thread | None = None

    def __call__(self, function: Callable[[], np.ndarray]) -> np.ndarray:
        if self.thread is not None and self.thread.is_alive():
            raise WorkerFailure("is still busy with an earlier call that took too long")
        result: list[np.ndarray | BaseException] = []

        def work() -> None:
            try:
                result.append(function())
            except BaseException as error:  # SystemExit too: it is told, not obeyed
                result.append(error)

        self.thread = threading.Thread(target=work, name="reward function", daemon=True)
        self.thread.start()
        self.thread.join(self.seconds)
        if not result:
            raise WorkerFailure(f"took more than {self.seconds:g} s")
        if isinstance(result[0], Exception):
            raise result[0]
        if isinstance(result[0], BaseException):
            raise WorkerFailure(f"raised {one_line(result[0])}")
        return result[0]


def probe_callable(reward: HostReward, queries: int = 2, answers: int = 3) -> None:
    """Scores `queries` x `answers` example texts, all distinct, before any long work.

    Raises:
        InputError: the reward raised, took too long, or gave a wrong shape, something other than numbers, or a number
            not finite.
    """
    questions = [f"What is {i + 2} + 3?" for i in range(queries)]
    replies = [[f"Example {j}: {i + 2} + 3 = {i + j + 4}." for j in range(answers)] for i in range(queries)]
    try:
        values = np.asarray(reward.score(questions, replies, ()).values)
    except InputError:
        raise
    except WorkerFailure as error:
        remedy = f"{error} on example texts; it must score every text in time"
        raise InputError("reward.callable", reward.name, remedy) from error
    except Exception as error:  # user code may raise anything
        remedy = f"raised {one_line(error)} on example texts; it must score every text"
        raise InputError("reward.callable", reward.name, remedy) from error
    if not np.isfinite(values).all():
        found = ", ".join(str(value) for value in values[~np.isfinite(values)][:3])
        remedy = f"returned {found} for example texts; rewards must be finite (NaN is for what cannot be scored)"
        raise InputError("reward.callable", reward.name, remedy)
