"""The study's arithmetic problems: six families, each cut once into held-out, development and training expressions.

No expression (its two numbers in their order and its operator, whatever the wording) is in two of the parts, so a model
that was trained on the last has never seen an expression of the first; of 193 of the 936 held-out ones it may have seen
the twin, 7 x 4 for 4 x 7. Self-play writes what it likes: `expressions` finds what
it has written, for the overlap with the held-out set.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

HELD_OUT, DEVELOPMENT, TRAINING = "held_out", "development", "training"

PHRASINGS = (
    "What is {a} {s} {b}?",
    "What is {a} {w} {b}?",
    "{a} {s} {b} = ?",
    "Calculate {a} {s} {b}.",
    "How much is {a} {w} {b}?",
    "Compute {a} {s} {b}",
)
"""Of a question; `s` is the operator's sign, `w` its word. Every part has all of them."""

SIGNS = {"+": "+", "-": "-", "*": "x"}
WORDS = {"+": "plus", "-": "minus", "*": "times"}

Expression = tuple[int, str, int]


class Problem(NamedTuple):
    """A question and what it is worth."""

    family: str
    expression: Expression
    question: str
    answer: int


def _sums(left: range, right: range) -> list[Expression]:
    """Sums, and differences that are not negative."""
    pairs = [(a, b) for a in left for b in right]
    return [(a, "+", b) for a, b in pairs] + [(a, "-", b) for a, b in pairs if a >= b]


FAMILIES: dict[str, list[Expression]] = {
    "one digit": _sums(range(10), range(10)),
    "two with one": _sums(range(10, 100), range(1, 10)),
    "two with two": _sums(range(10, 100), range(10, 100)),
    "times tables": [(a, "*", b) for a in range(2, 13) for b in range(2, 13)],
    "three digits": _sums(range(100, 1000, 3), range(101, 1000, 7)),
    "two by one": [(a, "*", b) for a in range(13, 100) for b in range(2, 10)],
}
"""A ladder; `one digit` to `two with two` are what the goals speak of, the others are harder."""

EASY = ("one digit", "two with one", "two with two")
PER_FAMILY = 156
"""Held-out problems of each family: 936 in all."""
DEVELOPMENT_PER_FAMILY = 24


def value(expression: Expression) -> int:
    a, operator, b = expression
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def question(expression: Expression, phrasing: str) -> str:
    a, operator, b = expression
    return phrasing.format(a=a, b=b, s=SIGNS[operator], w=WORDS[operator])


def part(name: str) -> list[Problem]:
    """All problems of a part, the same every time. Small families ask an expression in several wordings."""
    problems = []
    for family, expressions in FAMILIES.items():
        shuffled = random.Random(f"arithmetic/{family}").sample(expressions, len(expressions))
        held_out = min(PER_FAMILY, len(shuffled) // 2)
        development = min(DEVELOPMENT_PER_FAMILY, len(shuffled) // 8)
        bounds = {HELD_OUT: (0, held_out), DEVELOPMENT: (held_out, held_out + development)}
        first, last = bounds.get(name, (held_out + development, len(shuffled)))
        problems += list(_asked(family, shuffled[first:last], name))
    return problems


def _asked(family: str, expressions: list[Expression], name: str) -> Iterator[Problem]:
    """Each expression in turn, its wordings in turn, until there are as many as the part wants."""
    wanted = {HELD_OUT: PER_FAMILY, DEVELOPMENT: DEVELOPMENT_PER_FAMILY, TRAINING: len(expressions)}[name]
    for number in range(wanted):
        round_, place = divmod(number, len(expressions))
        expression = expressions[place]
        phrasing = PHRASINGS[(place + round_) % len(PHRASINGS)]
        yield Problem(family, expression, question(expression, phrasing), value(expression))


def twin(expression: Expression) -> Expression:
    """The same sum or product with its numbers exchanged; a difference is its own twin."""
    a, operator, b = expression
    return expression if operator == "-" else (b, operator, a)


_EXPRESSION = re.compile(r"(?<!\d)(\d{1,4})\s*([-−+*x×]|plus|minus|times|multiplied\s+by)\s*(?=(\d{1,4})(?!\d))", re.I)
_OPERATORS = {"plus": "+", "minus": "-", "−": "-", "times": "*", "x": "*", "×": "*", "X": "*"}


def expressions(text: str) -> set[Expression]:
    """Every `a operator b` inside a text, also as a part of a longer question: what it could teach by heart."""
    found = set()
    for a, operator, b in _EXPRESSION.findall(text):
        word = operator.lower().split()[0]
        sign = "*" if word == "multiplied" else _OPERATORS.get(word, word)
        found.add((int(a), sign, int(b)))
    return found
