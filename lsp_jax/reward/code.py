"""The code reward: the program in an answer, run in the sandbox against the tests of the data row.

Rows have the fields of HumanEval (`prompt`, `test`, `entry_point`) or of MBPP (`test_list`, optionally
`test_setup_code`). Every program gets its own sandbox.

A program passes when the harness, after the last test, returns a nonce drawn for this program, which is in no file,
environment or source that the program can see. So printing, exiting with 0, closing or writing to descriptors, raising
exceptions, and redefining the tests' functions or Python's builtins do not help.

The tests run in the program's process, so a program can still cheat: return objects whose `__eq__` is always true,
patch the standard library, or, if written against this harness, search the interpreter's memory for the nonce. It
cannot leave its sandbox. Programs have one process and one thread.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from lsp_jax.core.errors import InputError
from lsp_jax.reward.base import DataRows, HostReward, RewardOutput
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.execution.sandbox import sandboxed

MAX_PROGRAM = 100_000  # characters; a longer program scores 0
SECONDS = 10.0  # time limit of a program with its tests
logger: logging.Logger = logging.getLogger(__name__)

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)


def extract_code(answer: str) -> str:
    """Returns the program in an answer: the last fenced Python block, else the last fenced block, else all of it.

    An unclosed block extends to the end of the answer.
    """
    blocks, opened = [], None
    for match in _FENCE.finditer(answer):
        if opened is None:
            opened = match
        elif match[1].startswith(opened[1]) and not match[2]:
            blocks.append((opened[2].lower(), answer[opened.end() + 1 : match.start()]))
            opened = None
    if opened is not None:
        blocks.append((opened[2].lower(), answer[opened.end() + 1 :]))
    python = [text for language, text in blocks if language in ("python", "python3", "py")]
    if python or blocks:
        return (python or [text for _, text in blocks])[-1]
    return answer


def _defines(program: str, name: str) -> bool:
    return re.search(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(name)}\b", program, re.MULTILINE) is not None


def program_and_tests(row: Mapping[str, Any], answer: str) -> tuple[str, list[str]]:
    """Returns the program of an answer and its tests. `row` has passed `check_rows`.

    A HumanEval answer that defines the function is appended to the prompt, whose imports and helpers it may use; any
    other answer continues the prompt's function.
    """
    code = extract_code(answer)
    if "entry_point" not in row:
        setup = [row["test_setup_code"]] if row.get("test_setup_code") else []
        return "\n".join([*setup, code]), list(row["test_list"])
    prompt, name = row["prompt"], row["entry_point"]
    program = f"{prompt}\n    pass\n\n{code}" if _defines(code, name) else prompt + code
    return program, [f"{row['test']}\n\ncheck({name})\n"]


def check_rows(rows: DataRows) -> None:
    """Raises InputError for a row without tests in a known form."""
    if not rows:
        raise InputError("code reward rows", None, "needs a data set with tests; self-play has none")
    for place, row in enumerate(rows):
        if "entry_point" in row:
            wrong = [key for key in ("prompt", "test", "entry_point") if not _text(row.get(key))]
            if not wrong and not str(row["entry_point"]).isidentifier():
                wrong = ["entry_point"]
            kind = "a string (HumanEval's form)"
        else:
            tests = row.get("test_list")
            wrong = [] if isinstance(tests, list) and tests and all(map(_text, tests)) else ["test_list"]
            kind = "a list of tests (MBPP's form), or there must be prompt, test and entry_point (HumanEval's)"
        if not wrong and not isinstance(row.get("test_setup_code") or "", str):
            wrong, kind = ["test_setup_code"], "a string"
        if wrong:
            raise InputError(f"code reward rows[{place}].{wrong[0]}", row.get(wrong[0]), f"must be {kind}")


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def code_reward(
    weight: float = 1.0, name: str = "code", workers: Workers | None = None, timeout: float = SECONDS
) -> HostReward:
    """Returns a task reward: 1 if the answer's program passes all tests of its row within `timeout` seconds, else 0.

    An answer is masked only if its sandbox did not start. Check the rows with `check_rows` and the sandbox with
    `check_sandbox` before long work.

    Raises:
        InputError: no bwrap on PATH.
    """
    pool, program = workers or Workers(), sandboxed("code", once=True)

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
