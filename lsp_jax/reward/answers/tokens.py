"""Tokens of a result: numbers with their separators, names, words, operators and LaTeX commands.

Separators. Groups of three are thousands: 1,234 and 1'234 and 1_234 and 1 234, 1.234.567 with at least two points, and
12,34,567 as in India. 1.234 is a decimal, 1.234,5 is 1234.5. Any other comma separates a list, and so does each comma
within ( ), [ ] and \\{ \\}.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from lsp_jax.reward.answers.units import POWERS, UNITS


def words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


MAX_TOKENS = 400
_MAX_DIGITS = 600


class Unreadable(Exception):
    """The text is not of this grammar."""


class Token(NamedTuple):
    kind: str
    """num, name, fn, word, cur, scale, op (also LaTeX commands of the grammar), begin, end."""
    value: Any
    spaced: bool
    """Whether a space precedes it."""


_TAIL = r"(?:\.\d++)?+"
_COMMAS = re.compile(
    rf"[1-9]\d{{0,2}}+(?:,\d{{3}})++(?!\d|,\d){_TAIL}|[1-9]\d?+(?:,\d\d){{1,6}},\d{{3}}(?!\d|,\d){_TAIL}"
)
_OTHER_GROUPS = re.compile(
    rf"[1-9]\d{{0,2}}+(?:['_]\d{{3}})++(?![\d'_]){_TAIL}|[1-9]\d{{0,2}}+(?: \d{{3}})++(?!\d| ?[/\d\\]){_TAIL}"
)
_POINTS = re.compile(r"[1-9]\d{0,2}+(?:\.\d{3})++,\d++(?![,.]?\d)|[1-9]\d{0,2}+(?:\.\d{3}){2,}+(?![,.]?\d)")
_DECIMAL_COMMA = re.compile(r"(?:0,\d++|\d++,(?:\d{4,}+|\d\d?+))(?![,.]?\d)")
_REPEATING = re.compile(r"(\d*+)\.(\d*+)\\overline ?\{(\d{1,60})\}")
_PLAIN = re.compile(r"(?:\d++(?:\.\d++)?+|\.\d++)(?:[eE][+-]?+\d{1,4}(?![\w.]))?+")
_WORD = re.compile(r"[A-Za-z]\.[a-z]\.?(?![A-Za-z])|[A-Za-z]+(?:'[a-z]{1,2})?")
_COMMAND = re.compile(r"\\(?:begin|end) ?\{([A-Za-z]+\*?)\}(?: ?\{[lcr| ]*\})?|\\([A-Za-z]+|[{}\\])")

GREEK = words_of(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma "
    "tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"
)
FUNCTIONS = words_of(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt cbrt abs floor ceil "
    "binom frac factorial Re Im"
)
_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "ceiling": "ceil"}
_CONSTANTS = {"pi": "pi", "infty": "oo", "infinity": "oo", "inf": "oo", "oo": "oo"}
_COMMANDS = words_of(
    "pm mp le ge ne approx in cup to emptyset Reals degree lfloor rfloor lceil rceil frac sqrt binom backslash setminus"
)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_OPERATORS = "+-*/^!%()[]{},;:=<>|&_"
_CURRENCIES = {**{sign: sign for sign in "$£€¥₹¢₩₽₺"}, "rs": "₹", "usd": "$", "eur": "€", "gbp": "£", "us$": "$"}
_HEDGES = words_of("approximately about around roughly exactly approx circa only just precisely")
_ORDINALS = words_of("st nd rd th")
_NEGATIVE = frozenset(("minus", "negative"))
_PERCENT = frozenset(("percent", "percents", "pct", "percentage"))
_LETTERS = frozenset("bcdfghjklmnpqrstvwxyz")  # a run of these is a product
_PRODUCTS = words_of("ab abc abcd ac ad ax au uv ay az bu cu ai bi ci xi yi xe ye te ex ix iy")


def number(text: str) -> Token:
    """Returns the token of a plain number: (value, places after the point or None, significant digits)."""
    mantissa, mark, exponent = text.lower().partition("e")
    if len(mantissa) > _MAX_DIGITS:
        raise Unreadable("a number of too many digits")
    whole, point, decimals = mantissa.partition(".")
    value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals))
    if mark:
        value *= Fraction(10) ** int(exponent)
    significant = len((whole + decimals).lstrip("0"))
    return Token("num", (value, len(decimals) if point and not mark else None, significant), False)


def _number_at(text: str, place: int, commas: str) -> tuple[Token, int] | None:
    """Reads a number; `commas`: "thousands", "list" or "decimal"."""
    match = _REPEATING.match(text, place)
    if match:
        whole, fixed, repeated = match.groups()
        value = Fraction(int(whole + fixed + repeated) - int(whole + fixed or "0"), 10 ** len(fixed))
        return Token("num", (value / (10 ** len(repeated) - 1), None, 0), False), match.end()
    for pattern, wanted, drop, point in (
        (_POINTS, True, ".", ","),
        (_COMMAS, commas == "thousands", ",", ""),
        (_OTHER_GROUPS, True, "'_ ", ""),
        (_DECIMAL_COMMA, commas == "decimal", "", ","),
        (_PLAIN, True, "", ""),
    ):
        match = pattern.match(text, place) if wanted else None
        if match:
            plain = match.group().translate(dict.fromkeys(map(ord, drop)))
            return number(plain.replace(point, ".") if point else plain), match.end()
    return None


def tokens(text: str, commas: str = "") -> list[Token]:
    """Returns the tokens of a result; `commas`: how all are read, "" for the rule above.

    Raises:
        Unreadable: a character or command is not of the grammar, or there are too many.
    """
    found: list[Token] = []
    opened: list[str] = []
    place, spaced = 0, False
    while place < len(text):
        character = text[place]
        if character == " ":
            place, spaced = place + 1, True
            continue
        start = place
        if character.isdigit() or (character == "." and text[place + 1 : place + 2].isdigit()):
            inside = opened and opened[-1] in ("(", "[", "\\{")
            read = _number_at(text, place, commas or ("list" if inside else "thousands"))
            assert read is not None
            new, place = [read[0]], read[1]
        elif character.isalpha() and character.isascii():
            match = _WORD.match(text, place)
            assert match is not None
            new, place = _word(match.group(), found), match.end()
        elif character == "\\":
            new, place = _command(text, place)
        elif character in _OPERATORS:
            power = text.startswith("**", place)
            new, place = [Token("op", "^" if power else character, False)], place + (2 if power else 1)
        elif character in _CURRENCIES:
            new, place = [Token("cur", _CURRENCIES[character], False)], place + 1
        elif character == "." and found and found[-1].kind == "word":
            new, place = [], place + 1  # an abbreviation's
        else:
            raise Unreadable(f"has {character!r}")
        for token in new:
            if token.kind == "op" and token.value in ("(", "[", "{", "\\{"):
                opened.append(token.value)
            elif token.kind == "op" and token.value in (")", "]", "}", "\\}") and opened:
                opened.pop()
        found += [Token(token.kind, token.value, spaced and n == 0) for n, token in enumerate(new)]
        spaced = False
        if len(found) > MAX_TOKENS or place == start:
            raise Unreadable("is too long")
    return found


def _command(text: str, place: int) -> tuple[list[Token], int]:
    match = _COMMAND.match(text, place)
    if match is None:
        raise Unreadable("has a lone backslash")
    environment, name = match.groups()
    if environment:
        kind = "begin" if match.group().startswith("\\begin") else "end"
        token = Token(kind, environment, False)
    elif name == "\\":
        token = Token("op", "row", False)
    elif name in ("{", "}") or name in _COMMANDS:
        token = Token("op", "\\" + name, False)
    elif name in _CONSTANTS:
        token = Token("const", _CONSTANTS[name], False)
    elif name in GREEK:
        token = Token("name", name, False)
    elif name in FUNCTIONS:
        token = Token("fn", name, False)
    else:
        raise Unreadable(f"has \\{name}")
    return [token], match.end()


def _word(word: str, before: list[Token]) -> list[Token]:
    """Returns the tokens of a run of letters."""
    lower = word.lower().rstrip(".")
    if len(word) == 1:
        kind = "const" if word in "ie" else "op" if word == "°" else "name"
        return [Token(kind, word, False)]
    if lower in ("and", "or"):
        return [Token("op", "and", False)]
    if lower in _CONSTANTS:
        return [Token("const", _CONSTANTS[lower], False)]
    if lower in _ORDINALS and before and before[-1].kind == "num":
        return []
    name = _NAMES.get(lower, lower)
    if name in FUNCTIONS:
        return [Token("fn", name, False)]
    if lower in _HEDGES and not before:
        return []
    if lower in _NEGATIVE:
        return [Token("op", "-", False)]
    if lower in _PERCENT:
        return [Token("op", "%", False)]
    if lower in _SCALES:
        return [Token("scale", _SCALES[lower], False)]
    if lower in _CURRENCIES and not (before and before[-1].kind == "num"):
        return [Token("cur", _CURRENCIES[lower], False)]
    if word in UNITS or lower in UNITS or lower in POWERS:
        return [Token("word", word.rstrip("."), False)]
    product = len(word) <= 4 and (set(word) <= _LETTERS or word in _PRODUCTS)
    named = word.isupper() and len(word) <= 3 and bool(before)
    if product or named:
        return [Token("const" if letter in "ie" else "name", letter, False) for letter in word]
    return [Token("word", word, False)]
