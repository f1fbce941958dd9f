"""The code reward: a program from the answer, run in the sandbox against the row's tests.

Rows are spelled as HumanEval's (`prompt`, `test`, `entry_point`) or as MBPP's (`test_list`, perhaps `test_setup_code`).
Every program gets a sandbox of its own.

A program has passed when the harness, after the last test, says a number that was drawn for this program alone and is
in no file, environment or source that the program can see. So it does not help to print, to exit with 0, to close or
write to descriptors, to raise exceptions of any kind, or to define the tests' functions and Python's builtins anew.

What this cannot show is that the function is right where the tests are blind: results whose `__eq__` is always true,
modules of the standard library changed under the tests' feet, or a program that was written against this harness and
searches the interpreter's memory for the number. The tests run in the program's process, and such a program can pass
them. It still gets no further than its sandbox. Programs have one process and one thread.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from lsp_jax.core.errors import InputError
from lsp_jax.reward.base import HostReward, RewardOutput, Rows
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.execution.sandbox import sandboxed

MAX_PROGRAM = 100_000  # characters; a longer program scores 0
SECONDS = 10.0  # for a program and its tests
logger: logging.Logger = logging.getLogger(__name__)

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)


def extract_code(answer: str) -> str:
    """The program in an answer: its last block fenced as Python, else its last fenced block, else all of it.

    A block without an end reaches to the end of the answer.
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
    """The request for an answer: the program, and the tests one by one. `row` has passed `check_rows`.

    A HumanEval answer that defines the function follows the prompt, whose imports and helpers it may use; any other
    answer is the rest of the prompt's function.
    """
    code = extract_code(answer)
    if "entry_point" not in row:
        setup = [row["test_setup_code"]] if row.get("test_setup_code") else []
        return "\n".join([*setup, code]), list(row["test_list"])
    prompt, name = row["prompt"], row["entry_point"]
    program = f"{prompt}\n    pass\n\n{code}" if _defines(code, name) else prompt + code
    return program, [f"{row['test']}\n\ncheck({name})\n"]


def check_rows(rows: Rows) -> None:
    """Raises InputError for a row that has no tests of a known form."""
    if not rows:
        raise InputError("code reward rows", None, "needs a data set with tests; self-play has none")
    for place, row in enumerate(rows):
        if "entry_point" in row:
            wrong = [key for key in ("prompt", "test", "entry_point") if not _text(row.get(key))]
            if not wrong and not str(row["entry_point"]).isidentifier():
                wrong = ["entry_point"]
            kind = "a text (HumanEval's form)"
        else:
            tests = row.get("test_list")
            wrong = [] if isinstance(tests, list) and tests and all(map(_text, tests)) else ["test_list"]
            kind = "a list of tests (MBPP's form), or there must be prompt, test and entry_point (HumanEval's)"
        if not wrong and not isinstance(row.get("test_setup_code") or "", str):
            wrong, kind = ["test_setup_code"], "a text"
        if wrong:
            raise InputError(f"code reward rows[{place}].{wrong[0]}", row.get(wrong[0]), f"must be {kind}")


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def code_reward(
    weight: float = 1.0, name: str = "code", workers: Workers | None = None, timeout: float = SECONDS
) -> HostReward:
    """Task reward: 1 when the answer's program passes all tests of its row within `timeout` seconds, else 0.

    An answer is masked only when its sandbox did not start. Check the rows with `check_rows` and the sandbox with
    `check_sandbox` before long work.

    Raises:
        InputError: no bwrap on PATH.
    """
    pool, program = workers or Workers(), sandboxed("code", once=True)

    def score(queries: list[str], answers: list[list[str]], rows: Rows = ()) -> RewardOutput:
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
