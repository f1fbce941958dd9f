"""Numbers and expressions of results, compared: exactly as fractions where they are rational, else by sympy."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from lsp_jax.reward.answers.expressions import Node

ROUNDED = 6
"""Significant digits from which a decimal may be a rounded number."""
MAX_BITS = 1 << 18
_MAX_FACTORIAL = 10_000
_QUICK, _MANY = 60, 1000  # decimal digits of the first look, and of the proof
_POINTS = ((3, 7), (-5, 11), (13, 17), (-19, 23), (29, 31), (-37, 41), (43, 29), (-47, 13))


def exact(node: Node) -> Fraction | None:
    """Returns the value of a rational constant; None for another node, and beyond `MAX_BITS` bits."""
    kind = node[0]
    if kind == "num":
        return node[1]
    if kind not in ("neg", "pct", "fact", "add", "mul", "div", "pow", "fn"):
        return None
    values = [exact(part) for part in (node[2:] if kind == "fn" else node[1:])]
    known = [value for value in values if value is not None]
    if len(known) < len(values) or any(_bits(value) > MAX_BITS for value in known):
        return None
    first, last = known[0], known[-1]
    if kind == "fn":
        return _function(node[1], known)
    if kind == "pow":
        return _power(first, last)
    if kind == "fact":
        whole = first.denominator == 1 and 0 <= first <= _MAX_FACTORIAL
        return Fraction(math.factorial(int(first))) if whole else None
    if kind == "div":
        return first / last if last else None
    return {"neg": -first, "pct": first / 100, "add": first + last, "mul": first * last}[kind]


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        if base >= 0 and exponent.denominator == 2:  # the root of a square
            roots = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if roots[0] ** 2 == base.numerator and roots[1] ** 2 == base.denominator:
                return _power(Fraction(*roots), Fraction(exponent.numerator))
        return None
    if abs(exponent) * _bits(base) > MAX_BITS or (base == 0 and exponent < 0):
        return None
    return base ** int(exponent)


def _function(name: str, values: list[Fraction]) -> Fraction | None:
    if name == "binom":
        top, bottom = values
        if top.denominator != 1 or bottom.denominator != 1 or not 0 <= bottom <= top <= _MAX_FACTORIAL:
            return None
        return Fraction(math.comb(int(top), int(bottom)))
    one = {"abs": abs, "floor": math.floor, "ceil": math.ceil}.get(name)
    return Fraction(one(values[0])) if one else None


# --- rounded decimals ---


def _decimal(node: Node) -> tuple[Fraction, int, int] | None:
    """Returns (value, places, significant digits) of a decimal as written."""
    if node[0] == "num":
        return None if node[2] is None else node[1:]
    if node[0] in ("neg", "pct"):
        inner = _decimal(node[1])
        if inner is not None:
            value, places, digits = inner
            return (-value, places, digits) if node[0] == "neg" else (value / 100, places + 2, digits)
    return None


def _literal(node: Node) -> bool:
    return (node[0] == "num" and node[3] > 0) or (node[0] in ("neg", "pct") and _literal(node[1]))


def rounds_to(decimal: Node, other: Node) -> bool:
    """Whether the first is a long decimal, and the rounding or truncation of the second, which is no literal."""
    written = _decimal(decimal)
    if written is None or written[2] < ROUNDED or _literal(other):
        return False
    value = exact(other)
    if value is None:
        value = approximate(other, written[2] + 40)
    if value is None:
        return False
    scaled, whole = abs(value) * 10 ** written[1], abs(written[0]) * 10 ** written[1]
    near = whole in (math.floor(scaled), math.floor(scaled + Fraction(1, 2)))
    return near and (value < 0) == (written[0] < 0)


# --- sympy ---


def _sympy(node: Node) -> Any:
    """Returns the sympy expression of a scalar."""
    import sympy  # only in the sandbox: it takes half a second

    kind = node[0]
    if kind == "num":
        return sympy.Rational(node[1].numerator, node[1].denominator)
    if kind == "name":
        return sympy.Symbol(node[1])
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[node[1]]
    if kind == "fn":
        return _sympy_function(node[1], [_sympy(part) for part in node[2:]])
    parts = [_sympy(part) for part in node[1:]]
    first, last = parts[0], parts[-1]
    if kind == "pow":
        return sympy.cbrt(first) if last == sympy.Rational(1, 3) and first.is_positive else _real_root(first, last)
    if kind == "fact":
        return sympy.factorial(first)
    if kind == "deg":
        return first * sympy.pi / 180
    operation = {"neg": -first, "pct": first / 100, "add": first + last, "mul": first * last}.get(kind)
    if operation is None and kind == "div":
        operation = first / last
    if operation is None:
        raise ValueError(kind)
    return operation


def _real_root(base: Any, exponent: Any) -> Any:
    """The power; an odd root of a negative number is the real one."""
    if exponent.is_Rational and base.is_negative and exponent.q % 2 == 1 and exponent.q > 1:
        return (-1) ** exponent.p * (-base) ** exponent
    return base**exponent


def _sympy_function(name: str, values: list[Any]) -> Any:
    import sympy

    inverse = name.startswith("arc")
    known = {
        "abs": sympy.Abs,
        "ceil": sympy.ceiling,
        "binom": sympy.binomial,
        "log": lambda x: sympy.log(x) / sympy.log(10),
        "lg": lambda x: sympy.log(x) / sympy.log(10),
        "ln": sympy.log,
        "Re": sympy.re,
        "Im": sympy.im,
    }
    return (known.get(name) or getattr(sympy, "a" + name[3:] if inverse else name))(*values)


def approximate(node: Node, digits: int) -> Fraction | None:
    """Returns a real constant to so many digits; None for another node."""
    value = _sympy(node).evalf(digits)
    if not (value.is_Float or value.is_Rational) or not value.is_finite:
        return None
    import sympy

    return Fraction(*map(int, sympy.Rational(value).as_numer_denom()))


def _near(first: Any, second: Any, digits: int) -> bool | None:
    """Whether two sympy constants agree to nearly so many digits; None if one has no value."""
    values = [value.evalf(digits + 20) for value in (first, second)]
    if not all(value.is_number and value.is_finite for value in values):
        return None
    difference, size = abs(values[0] - values[1]), max(abs(values[0]), abs(values[1]))
    return bool(difference <= size * 10 ** (-(digits - digits // 10)))


def _equal(first: Any, second: Any) -> bool | None:
    """Whether two sympy constants are equal; None if one has no finite value."""
    import sympy

    difference = first - second
    if difference.is_Rational:
        return bool(difference == 0)
    quick = _near(first, second, _QUICK)
    if not quick:
        tiny = quick is False and bool(abs(difference.evalf(_QUICK)) < sympy.Rational(1, 10**50))
        return bool(sympy.simplify(difference) == 0) if tiny and 0 in (first, second) else quick
    return _near(first, second, _MANY)


def same_constant(gold: Node, answer: Node) -> bool:
    """Whether two constants are equal, at a thousand digits where they are irrational."""
    first, second = _sympy(gold), _sympy(answer)
    return bool(first == second) or _equal(first, second) is True


def same_function(gold: Node, answer: Node, ratio: float = 0) -> bool:
    """Whether two expressions with names are equal at several rational points.

    `ratio`: 1 if they may differ by a positive factor, infinity by any factor but 0.
    """
    first, second = _sympy(gold), _sympy(answer)
    if not ratio and first == second:
        return True
    names = sorted(first.free_symbols | second.free_symbols, key=str)
    factor, agreed = None, 0
    for point in range(5):
        values = {
            name: _rational(*_POINTS[(point + 3 * number) % len(_POINTS)], number) for number, name in enumerate(names)
        }
        at = [expression.subs(values) for expression in (first, second)]
        if ratio:
            if 0 in at:
                if at[0] != at[1]:
                    return False
                continue
            quotient = at[0] / at[1]
            factor = quotient if factor is None else factor
            if ratio == 1 and not quotient.evalf(_QUICK).is_positive:
                return False
            at = [quotient, factor]
        equal = _equal(*at)
        if equal is False:
            return False
        agreed += equal is True
    return agreed >= 3


def _rational(top: int, bottom: int, number: int) -> Any:
    import sympy

    return sympy.Rational(top + 2 * number, bottom)
