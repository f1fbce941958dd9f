"""Host rewards that cannot hang the run: arithmetic answers and any Python callable.

A named function (`module:function`, `file.py:function`) runs in a worker process; a function object, as in a notebook,
in a separate thread with a time limit. A call that fails or times out raises `WorkerFailure`; `score_on_host` logs it
and masks all answers of the component in that iteration.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lsp_jax.core.errors import InputError, one_line
from lsp_jax.reward.base import DataRows, HostReward, Kind, RewardOutput
from lsp_jax.reward.execution.pool import Program, WorkerFailure, Workers, line_of
from lsp_jax.reward.execution.user_functions import call_reward, reward_array

_ARITHMETIC = "lsp_jax.reward.arithmetic:grade"


def arithmetic_reward(weight: float = 1.0, name: str = "arithmetic", workers: Workers | None = None) -> HostReward:
    """Returns a task reward: 1 if the answer's final number equals the query's value, else 0.

    Queries that `parse_arithmetic` cannot parse are invalid. Grading runs in `workers`, by default a pool of its own.
    """
    pool = workers or Workers(1)

    def score(queries: list[str], answers: list[list[str]], rows: DataRows = ()) -> RewardOutput:
        values_NG = _in_worker(pool, _ARITHMETIC, name, queries, answers, ())
        valid_N = np.all(np.isfinite(values_NG), axis=1)
        values_NG[~valid_N] = 0
        return RewardOutput(values_NG, np.ones(values_NG.shape, bool), valid_N)

    return HostReward(name, "task", weight, score)


def callable_reward(
    function: str | Callable[..., Any],
    name: str,
    kind: Kind = "task",
    weight: float = 1.0,
    workers: Workers | None = None,
    timeout: float = 60.0,
) -> HostReward:
    """Returns a reward from a Python function: (N queries, N lists of G answers) -> rewards [N, G].

    A parameter named `rows` also receives the N data set rows (none in self-play). The function may return lists of
    lists, or numpy, jax or CPU torch arrays of numbers. NaN or infinity masks the answer; all queries are valid.

    A string names the function, as in `load_callable`: it runs in `workers` (by default a pool of its own) with the
    pool's time limit. A function object runs in this process for at most `timeout` seconds per call. As Python cannot
    stop a thread, a call that times out keeps running, and further calls fail immediately until it ends.

    The score raises InputError for a wrong shape or non-numeric values, WorkerFailure when the call timed out or its
    process died, and any exception of a function object.
    """
    if isinstance(function, str):
        pool, spec = workers or Workers(1), function

        def call(queries: list[str], answers: list[list[str]], rows: DataRows) -> np.ndarray:
            return _in_worker(pool, spec, name, queries, answers, rows)
    else:
        timed, direct = _TimedCall(timeout), function

        def call(queries: list[str], answers: list[list[str]], rows: DataRows) -> np.ndarray:
            return timed(lambda: call_reward(direct, name, queries, answers, rows))

    def score(queries: list[str], answers: list[list[str]], rows: DataRows = ()) -> RewardOutput:
        values_NG = call(queries, answers, rows)
        return RewardOutput(values_NG, np.isfinite(values_NG), np.ones(len(queries), bool))

    return HostReward(name, kind, weight, score)


def _in_worker(
    pool: Workers,
    spec: str,
    name: str,
    queries: list[str],
    answers: list[list[str]],
    rows: Sequence[Mapping[str, Any]],
) -> np.ndarray:
    """Calls the function named by `spec` with the complete batch; returns float32 [N, G].

    Raises:
        InputError: no such function, or it returned a wrong shape or non-numeric values.
        WorkerFailure: it raised, timed out, or its process died.
    """
    item = {"queries": queries, "answers": answers, "rows": [dict(row) for row in rows]}
    (outcome,) = pool.run(_program(spec), [item])
    reply = outcome.reply
    if outcome.refused:
        raise InputError("reward.callable", spec, outcome.refused)
    if reply is None:
        raise WorkerFailure(outcome.failure)
    if "refused" in reply:
        raise InputError("reward.callable", name, line_of(str(reply["refused"])))
    if "values" not in reply:
        raise WorkerFailure(f"raised {line_of(str(reply.get('raised')))}")
    return reward_array(reply["values"], name, (len(queries), len(answers[0])))


def _program(spec: str) -> Program:
    return Program((sys.executable, "-m", "lsp_jax.reward.execution.worker_main", spec))


class _TimedCall:
    """Calls functions in a daemon thread with a time limit, one at a time."""

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
            except BaseException as error:  # including SystemExit, which must not end the run
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
    """Scores `queries` x `answers` distinct example texts before any long work.

    Raises:
        InputError: the reward raised, timed out, or returned a wrong shape, non-numeric or non-finite values.
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
        examples = ", ".join(str(value) for value in values[~np.isfinite(values)][:3])
        remedy = (
            f"returned {examples} for example texts; rewards must be finite (NaN is for answers that cannot be scored)"
        )
        raise InputError("reward.callable", reward.name, remedy)
