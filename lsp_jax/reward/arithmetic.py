"""Parsing and grading of arithmetic questions and answers.

Model text is never evaluated: `parse_arithmetic` parses a query, `final_number` an answer, both in linear time. Imports
no JAX, because it runs in a worker process.
"""

from __future__ import annotations

import re
from decimal import Decimal

MAX_QUESTION = 200  # characters
MAX_BRACKETS = 10  # brackets in one question, which bounds the recursion
MAX_NUMBER = 40  # characters of an answer's number, far above the value of any question

_LEAD_IN = re.compile(
    r"\s*(?:(?:what\s+is|what['’]s|how\s+much\s+is|calculate|compute|find|solve|evaluate)\b\s*:?)?",
    re.ASCII | re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\s*(?:([0-9]{1,4})|(plus|minus|times|multiplied\s+by)(?![a-z])|([-−+*x×()=?.]))",
    re.ASCII | re.IGNORECASE,
)
_OPERATORS = {"plus": "+", "minus": "-", "−": "-", "times": "*", "multiplied": "*", "x": "*", "×": "*"}

# Atomic groups and possessive quantifiers never backtrack, so matching is linear. For the same reason only the first
# number of a run joined by commas is tried as digit groups of thousands.
_NUMBER = re.compile(
    r"(?<![A-Za-z_\d])(?<!\d\.)"
    r"(?>(?>(?<!\d,)[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+|(?<![\w.])\.[0-9]++)"
    r"(?![A-Za-z_]*+\d)(?!\.\d)"
)


class _NotArithmeticError(Exception):
    """The text does not match the grammar."""


def parse_arithmetic(text: str) -> int | None:
    """Returns the value of an arithmetic question, None for any other text.

    A question is an optional lead-in ("What is", "What's", "How much is", "Calculate", "Compute", "Find", "Solve",
    "Evaluate", in any case, a colon may follow), an expression, and an optional "=", "?" and "." in this order. The
    expression has 2 to 4 integers of up to 4 ASCII digits, joined by + - − * x × plus, minus, times or "multiplied
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
    """Splits the text into numbers and operator characters; empty if any part of it is not a token."""
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
    """Parses ["-"] product {("+" | "-") product}."""
    value = -_product(tokens) if _take(tokens, "-") else _product(tokens)
    while sign := _take(tokens, "+", "-"):
        value += _product(tokens) if sign == "+" else -_product(tokens)
    return value


def _product(tokens: list[int | str]) -> int:
    """Parses factor {"*" factor}."""
    value = _factor(tokens)
    while _take(tokens, "*"):
        value *= _factor(tokens)
    return value


def _factor(tokens: list[int | str]) -> int:
    """Parses a number or a sum in brackets."""
    token = tokens.pop() if tokens else None
    if isinstance(token, int):
        return token
    if token == "(":
        value = _sum(tokens)
        if _take(tokens, ")"):
            return value
    raise _NotArithmeticError


def final_number(text: str) -> Decimal | None:
    """Returns the last number in `text`, exactly; None if there is none or the last has over 40 characters.

    - "1,234" is 1234; commas that do not group by thousands separate numbers: the last of "12,5" is 5.
    - "7.0" equals 7, ".5" is a half, and the full stop after "7." ends a sentence.
    - A minus sign ("-" or "−") counts if it directly precedes the number and is neither between two operands ("10-7",
      "10 -7", "(3) -7") nor directly after a letter ("GPT-4").
    - Letters may follow ("12km", "7th"). Runs with a digit after a letter ("x2", "H2O", "1e5") or with several points
      ("1.2.3") are taken as names and skipped.
    - Only ASCII digits count; a number adjacent to other digits is skipped.
    """
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    if last is None or len(last.group()) > MAX_NUMBER:
        return None
    value = Decimal(last.group().replace(",", ""))
    return -value if _negative(text[: last.start()]) else value


def _negative(before: str) -> bool:
    """Whether the text before a number ends in a minus sign of the number."""
    if not before.endswith(("-", "−")):
        return False
    touching, operand = before[-2:-1], before[:-1].rstrip()[-1:]
    return not (touching.isalpha() or operand.isdecimal() or operand == ")")


def grade(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
    """Returns [N, G]: 1 if the answer's final number equals the query's value, else 0; NaN for unparsable queries."""
    expected = [parse_arithmetic(query) for query in queries]
    return [
        [float("nan") if value is None else float(final_number(answer) == value) for answer in group]
        for value, group in zip(expected, answers, strict=True)
    ]
