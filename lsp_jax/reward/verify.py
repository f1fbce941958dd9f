"""Verifiable rewards: arithmetic answers, and any Python callable.

What a model wrote is read by small grammars of ours, never by `eval`: a query by `parse_arithmetic`, an answer by
`final_number`. Both take time linear in the text.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lsp_jax.errors import InputError
from lsp_jax.reward.base import HostReward, Kind, RewardOutput, Rows

MAX_QUESTION = 200  # characters
MAX_BRACKETS = 10  # opened in one question: bounds the recursion
MAX_NUMBER = 40  # characters of an answer's number; no value of a question comes near it

_LEAD_IN = re.compile(
    r"\s*(?:(?:what\s+is|what['’]s|how\s+much\s+is|calculate|compute|find|solve|evaluate)\b\s*:?)?",
    re.ASCII | re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\s*(?:([0-9]{1,4})|(plus|minus|times|multiplied\s+by)(?![a-z])|([-−+*x×()=?.]))",
    re.ASCII | re.IGNORECASE,
)
_OPERATORS = {"plus": "+", "minus": "-", "−": "-", "times": "*", "multiplied": "*", "x": "*", "×": "*"}

# Atomic and possessive: nothing that was matched is tried again, so the time is linear. Only the first number of a run
# joined by commas tries to read the run as thousands, for the same reason.
_NUMBER = re.compile(
    r"(?<![A-Za-z_\d])(?<!\d\.)"
    r"(?>(?>(?<!\d,)[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+|(?<![\w.])\.[0-9]++)"
    r"(?![A-Za-z_]*+\d)(?!\.\d)"
)


class _NotArithmeticError(Exception):
    """The text is not a sentence of the grammar."""


def parse_arithmetic(text: str) -> int | None:
    """The value of an arithmetic question, None when the text is anything else.

    A question is an optional lead-in ("What is", "What's", "How much is", "Calculate", "Compute", "Find", "Solve",
    "Evaluate", in any case, a colon may follow), an expression, and an optional "=", "?" and "." in this order. The
    expression has 2 to 4 whole numbers of up to 4 ASCII digits, joined by + - − * x × plus, minus, times or "multiplied
    by", with the usual precedence; brackets are allowed, and a minus at its start or after an opening bracket.
    """
    if len(text) > MAX_QUESTION:
        return None
    tokens = _tokens(text)
    if not 2 <= sum(isinstance(token, int) for token in tokens) <= 4 or tokens.count("(") > MAX_BRACKETS:
        return None
    tokens.reverse()  # the next token is the last of the list
    try:
        value = _sum(tokens)
    except _NotArithmeticError:
        return None
    for mark in "=?.":
        _take(tokens, mark)
    return None if tokens else value


def _tokens(text: str) -> list[int | str]:
    """Numbers, and one character for all else; no tokens when a part of the text is not one."""
    text = text.rstrip()
    match = _LEAD_IN.match(text)
    position, tokens = match.end() if match else 0, []
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return []
        number, word, mark = match.groups()
        symbol = (word or mark or "").lower().split()
        tokens.append(int(number) if number else _OPERATORS.get(symbol[0], symbol[0]))
        position = match.end()
    return tokens


def _take(tokens: list[int | str], *kinds: str) -> int | str | None:
    return tokens.pop() if tokens and tokens[-1] in kinds else None


def _sum(tokens: list[int | str]) -> int:
    """["-"] product {("+" | "-") product}."""
    value = -_product(tokens) if _take(tokens, "-") else _product(tokens)
    while sign := _take(tokens, "+", "-"):
        value += _product(tokens) if sign == "+" else -_product(tokens)
    return value


def _product(tokens: list[int | str]) -> int:
    """factor {"*" factor}."""
    value = _factor(tokens)
    while _take(tokens, "*"):
        value *= _factor(tokens)
    return value


def _factor(tokens: list[int | str]) -> int:
    """A number, or a sum in brackets."""
    token = tokens.pop() if tokens else None
    if isinstance(token, int):
        return token
    if token == "(":
        value = _sum(tokens)
        if _take(tokens, ")"):
            return value
    raise _NotArithmeticError


def final_number(text: str) -> Decimal | None:
    """The last number in `text`, exactly; None when there is none, or when the last is over 40 characters long.

    - "1,234" is 1234; commas that do not group by thousands separate numbers: the last of "12,5" is 5.
    - "7.0" equals 7, ".5" is a half, and the full stop after "7." ends a sentence.
    - A minus sign ("-" or "−") counts when it touches the number and is neither between two operands ("10-7", "10 -7",
      "(3) -7") nor after a letter that it touches ("GPT-4").
    - Letters may follow ("12km", "7th"). Runs with a digit after a letter ("x2", "H2O", "1e5") or with several points
      ("1.2.3") are names and are skipped.
    - Only ASCII digits make numbers; a number that touches other digits is skipped.
    """
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    if last is None or len(last.group()) > MAX_NUMBER:
        return None
    value = Decimal(last.group().replace(",", ""))
    return -value if _negative(text[: last.start()]) else value


def _negative(before: str) -> bool:
    """Whether the text before a number ends in its sign."""
    if not before.endswith(("-", "−")):
        return False
    touching, operand = before[-2:-1], before[:-1].rstrip()[-1:]
    return not (touching.isalpha() or operand.isdecimal() or operand == ")")


def arithmetic_reward(weight: float = 1.0, name: str = "arithmetic") -> HostReward:
    """Task reward: 1 when the answer's final number equals the query's value, else 0, also for an answer without one.

    A query that `parse_arithmetic` cannot read is not valid.
    """

    def score(queries: list[str], answers: list[list[str]], rows: Rows = ()) -> RewardOutput:
        expected = [parse_arithmetic(query) for query in queries]
        values = np.array(
            [
                [value is not None and final_number(answer) == value for answer in group]
                for value, group in zip(expected, answers, strict=True)
            ],
            np.float32,
        )
        return RewardOutput(values, np.ones(values.shape, bool), np.array([value is not None for value in expected]))

    return HostReward(name, "task", weight, score)


def callable_reward(
    function: Callable[[list[str], list[list[str]]], Any], name: str, kind: Kind = "task", weight: float = 1.0
) -> HostReward:
    """A reward from a Python function: (N queries, N lists of G answers) -> rewards [N, G].

    Lists of lists, numpy, jax and CPU torch arrays of numbers are taken. NaN or infinity masks the answer; all queries
    are valid. The score raises InputError for another shape or for what are not numbers, and what the function raises.
    """

    def score(queries: list[str], answers: list[list[str]], rows: Rows = ()) -> RewardOutput:
        # copies: a function that sorts its arguments must not change what others read
        result = function(list(queries), [list(group) for group in answers])
        values = _reward_array(result, name, (len(queries), len(answers[0])))
        return RewardOutput(values, np.isfinite(values), np.ones(len(queries), bool))

    return HostReward(name, kind, weight, score)


def _reward_array(result: Any, name: str, shape: tuple[int, int]) -> np.ndarray:
    """float32 [N, G]; raises InputError for anything else."""
    returns = f"the function must return numbers of shape (queries, answers per query) = {shape}, one row a query"
    try:
        array = np.asarray(result)
    except ValueError as error:  # rows of different lengths
        raise InputError("reward.callable", name, f"returned rows of unequal length; {returns}") from error
    if array.shape != shape:
        raise InputError("reward.callable", name, f"returned shape {array.shape}; {returns}")
    # jax's issubdtype knows bfloat16, numpy's does not
    if not any(jnp.issubdtype(array.dtype, number) for number in (np.bool_, np.integer, np.floating)):
        raise InputError("reward.callable", name, f"returned dtype {array.dtype}; {returns}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and masked
        return array.astype(np.float32)


def probe_callable(reward: HostReward, queries: int = 2, answers: int = 3) -> None:
    """Scores `queries` x `answers` example texts, all distinct, before any long work.

    Raises:
        InputError: the reward raised, or gave a wrong shape, something other than numbers, or a number not finite.
    """
    questions = [f"What is {i + 2} + 3?" for i in range(queries)]
    replies = [[f"Example {j}: {i + 2} + 3 = {i + j + 4}." for j in range(answers)] for i in range(queries)]
    try:
        values = np.asarray(reward.score(questions, replies).values)
    except InputError:
        raise
    except Exception as error:  # user code may raise anything
        remedy = f"raised {_one_line(error)} on example texts; it must score every text"
        raise InputError("reward.callable", reward.name, remedy) from error
    if not np.isfinite(values).all():
        found = ", ".join(str(value) for value in values[~np.isfinite(values)][:3])
        remedy = f"returned {found} for example texts; rewards must be finite (NaN is for what cannot be scored)"
        raise InputError("reward.callable", reward.name, remedy)


def load_callable(spec: str) -> Callable[..., Any]:
    """The function that "package.module:function" or "path/to/file.py:function" names.

    This imports, that is runs, the user's own module: never build `spec` from what a model or a data set says.

    Raises:
        InputError: `spec` has another form, the module is missing or fails on import, or has no such function.
    """
    target, _, attribute = spec.rpartition(":")
    if not target or not attribute.isidentifier():
        raise InputError("reward.callable", spec, "must be package.module:function or path/to/file.py:function")
    try:
        module = _load_file(target) if target.endswith(".py") else importlib.import_module(target)
    except (Exception, SystemExit) as error:  # user code may raise anything, and scripts call sys.exit
        remedy = f"importing {target} raised {_one_line(error)}; a file is named as path/to/file.py:function"
        raise InputError("reward.callable", spec, remedy) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        remedy = f"{target} has no function {attribute}" if function is None else f"{attribute} cannot be called"
        raise InputError("reward.callable", spec, f"{remedy}; name a function of (queries, answers)")
    return function


def _load_file(path: str) -> Any:
    name = f"_lsp_jax_user_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
