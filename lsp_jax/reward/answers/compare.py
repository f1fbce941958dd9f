"""Whether two results are equal: exact fractions first, then sympy at many digits. No absolute tolerance.

A decimal of at least `ROUNDED` significant digits also equals a fraction or an irrational number of which it is the
rounding or the truncation; two decimals are compared exactly. A percentage equals its number and the hundredth of it,
an angle in degrees its number and its radians. Units that are known on both sides are compared, other words are not.
"""

from __future__ import annotations

import math
from itertools import takewhile
from typing import Any

from lsp_jax.reward.answers.expressions import Node, integer
from lsp_jax.reward.answers.numeric import exact, rounds_to, same_constant, same_function
from lsp_jax.reward.answers.units import unit_of

MAX_ELEMENTS = 60
_UNORDERED = ("list", "set")
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def same(gold: Node, answer: Node) -> bool:
    """Whether an answer's tree equals a gold's."""
    if gold == answer:
        return True
    if gold[0] == "choice" or answer[0] == "choice":
        return _same_choice(gold, answer)
    if gold[0] == "rel" or answer[0] == "rel":
        return _same_relation(gold, answer)
    for one, other in ((gold, answer), (answer, gold)):  # a list or set of one is its element
        if one[0] in _UNORDERED and len(one) == 2 and other[0] not in _UNORDERED:
            return same(one[1], answer) if one is gold else same(gold, one[1])
    if "qty" in (gold[0], answer[0]):
        return _same_quantity(gold, answer)
    if gold[0] in _SEQUENCES or answer[0] in _SEQUENCES:
        return _same_sequence(gold, answer)
    if "text" in (gold[0], answer[0]):
        return _words(gold) == _words(answer) is not None
    if gold[0] == "name" and len(gold[1]) == 1 and gold[1] in "ABCDEFGHIJ" and answer[0] in ("name", "const"):
        return answer[1].upper() == gold[1]  # the letter of a choice
    return same_scalar(gold, answer)


def _same_choice(gold: Node, answer: Node) -> bool:
    """Compares letters if the gold is or has one and the answer has one, else what stands after the letter."""
    golds, answers = (node[1:] if node[0] == "choice" else (node,) for node in (gold, answer))
    letters = [parts[0] for parts in (golds, answers) if parts[0][0] == "name" and len(parts[0][1]) == 1]
    if len(letters) == 2:
        return same(golds[0], answers[0])
    return same(golds[-1], answers[-1])


def _words(node: Node) -> str | None:
    return node[1] if node[0] == "text" else node[1].casefold() if node[0] == "name" else None


def same_scalar(gold: Node, answer: Node) -> bool:
    """Whether two numbers or expressions are equal."""
    for kind in ("pct", "deg"):
        if (gold[0] == kind) != (answer[0] == kind):
            bare = (gold[1], answer) if gold[0] == kind else (gold, answer[1])
            if same_scalar(*bare):
                return True
    first, second = exact(gold), exact(answer)
    if first is not None and second is not None:
        return first == second or rounds_to(gold, answer) or rounds_to(answer, gold)
    if not (_names(gold) or _names(answer)):
        return rounds_to(gold, answer) or rounds_to(answer, gold) or same_constant(gold, answer)
    return same_function(gold, answer)


def _names(node: Any) -> bool:
    return isinstance(node, tuple) and bool(node) and (node[0] == "name" or any(map(_names, node[1:])))


def _same_quantity(gold: Node, answer: Node) -> bool:
    """Compares values with units; a value without any is taken to have the other's."""
    words = [node[2][1:] if node[0] == "qty" else () for node in (gold, answer)]
    numerators = [tuple(takewhile(lambda word: word not in ("/", "per", "a", "an", "each"), each)) for each in words]
    if numerators[0] == words[0] or numerators[1] == words[1]:  # 18 dollars a day are 18 dollars
        words = numerators
    unit, others = map(unit_of, words)
    value, other = (node[1] if node[0] == "qty" else node for node in (gold, answer))
    if value[0] in _SEQUENCES or other[0] in _SEQUENCES:
        return (unit is None or others is None or unit == others) and same(value, other)
    if unit is None or others is None or unit == others:
        angle = [node for node, known in ((value, unit), (other, others)) if known and known[0] == (("angle", 1),)]
        if len(angle) == 1 and same_scalar(*(("deg", node) if node is angle[0] else node for node in (value, other))):
            return True
        return same_scalar(value, other)
    if unit[0] != others[0]:
        return False
    factor = others[1] / unit[1]
    scaled = ("mul", other, ("div", integer(factor.numerator), integer(factor.denominator)))
    return same_scalar(value, scaled)


# --- lists, sets, intervals, matrices ---

_SEQUENCES = ("list", "set", "tuple", "ratio", "interval", "union", "matrix")


def _same_sequence(gold: Node, answer: Node) -> bool:
    first, second = _canonical(gold), _canonical(answer)
    kinds = first[0], second[0]
    if "interval" in kinds and kinds[0] != kinds[1]:  # (1, 2) is a point or an open interval
        pair, interval = (first, second) if kinds[1] == "interval" else (second, first)
        if pair[0] != "tuple" or len(pair) != 3 or not (interval[3] and interval[4]):
            return False
        ends = ("tuple", *interval[1:3])
        return _in_order(pair, ends) if pair is first else _in_order(ends, pair)
    if kinds == ("interval", "interval"):
        return first[3:] == second[3:] and _in_order(first[:3], second[:3])
    if kinds == ("matrix", "matrix"):
        shapes = [(len(node[1]), len(node[1][0])) for node in (first, second)]
        flat = [("tuple", *(cell for row in node[1] for cell in row)) for node in (first, second)]
        return shapes[0] == shapes[1] and first[2] == second[2] and _in_order(*flat)
    if kinds[0] in _UNORDERED and kinds[1] in _UNORDERED:
        if "set" in kinds:
            first, second = _without_copies(first), _without_copies(second)
        return _any_order(first, second)
    if kinds[0] == kinds[1] == "union":
        return _any_order(first, second)
    if kinds[0] == kinds[1] or set(kinds) == {"tuple", "list"}:
        return _in_order(first, second)
    return False


def _canonical(node: Node) -> Node:
    """Makes intervals ends that are numbers where a tuple of infinity can be nothing else."""
    if node[0] == "tuple" and len(node) == 3 and any(_infinite(end) for end in node[1:]):
        return ("interval", node[1], node[2], True, True)
    if node[0] == "union":
        return ("union", *(_open_interval(part) for part in node[1:]))
    return node


def _open_interval(node: Node) -> Node:
    return ("interval", node[1], node[2], True, True) if node[0] == "tuple" and len(node) == 3 else node


def _infinite(node: Node) -> bool:
    return node == ("const", "oo") or (node[0] == "neg" and _infinite(node[1]))


def _in_order(first: Node, second: Node) -> bool:
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def _any_order(first: Node, second: Node) -> bool:
    if len(first) != len(second) or len(first) > MAX_ELEMENTS:
        return False
    left = list(second[1:])
    for element in first[1:]:
        place = next((n for n, other in enumerate(left) if same(element, other)), None)
        if place is None:
            return False
        del left[place]
    return True


def _without_copies(node: Node) -> Node:
    kept: list[Node] = []
    for element in node[1 : MAX_ELEMENTS + 2]:
        if not any(same(other, element) for other in kept):
            kept.append(element)
    return (node[0], *kept)


# --- equations and inequalities ---


def _same_relation(gold: Node, answer: Node) -> bool:
    for node in (gold, answer):
        if node[0] == "rel" and node[1] == ("in",) and _variable(node[2][0]) and gold[1] != answer[1]:
            return same(node[2][1], answer) if node is gold else same(gold, node[2][1])
    if gold[0] == answer[0] == "rel":
        return _same_relations(gold, answer)
    relation, other = (gold, answer) if gold[0] == "rel" else (answer, gold)
    stated = _stated(relation, chain=relation is answer)
    if stated is None:
        interval = _interval(relation)
        return interval is not None and other[0] in ("interval", "tuple", "union") and same(interval[1], other)
    return same(stated, other) if relation is gold else same(other, stated)


def _stated(relation: Node, chain: bool = False) -> Node | None:
    """Returns the value that an equation gives a name (x = 5), or its constants have in common (3 * 4 = 12).

    `chain`: the last side of any equation, as in 2 pi r = 6 pi.
    """
    operators, sides = relation[1], relation[2]
    if set(operators) <= {"="}:
        name, value = (sides[-1], sides[0]) if _variable(sides[-1]) else (sides[0], sides[-1])
        if _variable(sides[0]):
            name, value = sides[0], sides[-1]
        constants = [side for side in sides if exact(side) is not None]
        if any(exact(side) != exact(constants[0]) for side in constants):
            return None
        return value if _variable(name) or chain or len(constants) == len(sides) else None
    if operators[-1] == "~" and set(operators[:-1]) <= {"="}:  # 2/3 = 0.6667 rounded, x ~ 0.67
        return sides[-2] if not _variable(sides[-2]) else sides[-1]
    return sides[1] if operators == ("in",) and _variable(sides[0]) else None


def _variable(node: Node) -> str | None:
    """Returns the text of a name, also of f(x); None for another node."""
    if node[0] == "name":
        return str(node[1])
    if node[0] == "mul" and node[1][0] == "name" and (_variable(node[2]) or node[2][0] == "num"):
        return f"{node[1][1]}({node[2][1]})"
    return None


def _interval(relation: Node) -> tuple[str, Node] | None:
    """Returns (variable, interval) of a < x <= b, x > a and their kin."""
    operators, sides = relation[1], relation[2]
    if not (set(operators) <= {"<", "<="} or set(operators) <= {">", ">="}):
        return None
    if operators[0] in (">", ">="):
        operators, sides = tuple(_MIRRORED[o] for o in reversed(operators)), sides[::-1]
    places = [n for n, side in enumerate(sides) if side[0] == "name"]
    if len(places) != 1 or len(sides) > 3 or any(_names(side) for side in sides if side[0] != "name"):
        return None
    place, infinity = places[0], ("const", "oo")
    low = sides[place - 1] if place else ("neg", infinity)
    high = sides[place + 1] if place + 1 < len(sides) else infinity
    left = operators[place - 1] == "<" if place else True
    right = operators[place] == "<" if place < len(operators) else True
    if len(sides) == 3 and place != 1:
        return None
    return sides[place][1], ("interval", low, high, left, right)


def _same_relations(gold: Node, answer: Node) -> bool:
    first, second = _interval(gold), _interval(answer)
    if first and second:
        return first[0] == second[0] and same(first[1], second[1])
    names = [_variable(node[2][0]) or _variable(node[2][-1]) for node in (gold, answer)]
    values = _stated(gold), _stated(answer)
    if values[0] is not None and values[1] is not None:
        plain = all(name is None or len(name) < 3 or "(" not in name for name in names)
        if names[0] == names[1] or not plain:
            return names[0] == names[1] and same(values[0], values[1])
        if not any(_names(value) for value in values):
            return False  # x = 5 and y = 5
    if len(gold[1]) != 1 or len(answer[1]) != 1:
        return gold[1] == answer[1] and _in_order(("rel", *gold[2]), ("rel", *answer[2]))
    operator, other = gold[1][0], answer[1][0]
    sides = [("add", node[2][0], ("neg", node[2][1])) for node in (gold, answer)]
    if any(side[0] in _SEQUENCES or side[0] == "text" for node in (gold, answer) for side in node[2]):
        return False
    if operator == other and operator in ("=", "!="):
        return same_function(*sides, ratio=math.inf)
    if operator == other:
        return same_function(*sides, ratio=1)
    return other == _MIRRORED.get(operator) and same_function(sides[0], ("neg", sides[1]), ratio=1)
