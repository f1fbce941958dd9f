"""Scalar expressions of a result: numbers, names, functions, in LaTeX and in plain text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any

from lsp_jax.reward.answers.tokens import Token, Unreadable, words_of
from lsp_jax.reward.answers.units import UNITS

Node = tuple[Any, ...]
MAX_DEPTH = 40
END = Token("op", "", False)

_BOTH = {"\\pm": "plusminus", "\\mp": "minusplus"}
_CLOSING = {"\\lfloor": ("\\rfloor", "floor"), "\\lceil": ("\\rceil", "ceil")}
_REALS: Node = ("interval", ("neg", ("const", "oo")), ("const", "oo"), True, True)
SCALARS = words_of("num name const add mul div pow neg fact pct deg plusminus minusplus fn")


def integer(value: int) -> Node:
    return ("num", Fraction(value), None, len(str(abs(value))))


class Expressions(ABC):
    """Recursive descent with one token of lookahead; what stands in brackets is a subclass's to read."""

    def __init__(self, given: list[Token], glued_units: bool):
        self.given: list[Token] = given
        self.place: int = 0
        self.depth: int = 0
        self.bars: int = 0
        self.glued_units: bool = glued_units
        self.currency: str = ""

    @property
    def next(self) -> Token:
        return self.given[self.place] if self.place < len(self.given) else END

    @property
    def after(self) -> Token:
        return self.given[self.place + 1] if self.place + 1 < len(self.given) else END

    def at(self, *operators: str) -> bool:
        return self.next.kind == "op" and self.next.value in operators and self.next is not END

    def take(self, *operators: str) -> str:
        """Consumes one of the operators, if it is next; returns it or ""."""
        if not self.at(*operators):
            return ""
        self.place += 1
        return self.given[self.place - 1].value

    def need(self, operator: str) -> None:
        if not self.take(operator):
            raise Unreadable(f"lacks {operator}")

    def scalar(self, node: Node) -> Node:
        if node[0] not in SCALARS:
            raise Unreadable("has arithmetic of what is no number")
        return node

    def total(self) -> Node:
        value = self.term()
        while sign := self.take("+", "-", "\\pm", "\\mp"):
            right = self.scalar(self.term())
            self.scalar(value)
            if sign in ("+", "-"):
                value = ("add", value, right if sign == "+" else ("neg", right))
            else:
                value = (_BOTH[sign], value, right)
        return value

    def term(self) -> Node:
        value = self.factor()
        while True:
            if self.at("/") and self.after.kind == "word":  # $18/day
                return value
            sign = self.take("*", "/")
            if not sign and not self.juxtaposed(value):
                return value
            right = self.scalar(self.factor())
            value = ("div" if sign == "/" else "mul", self.scalar(value), right)

    def juxtaposed(self, value: Node) -> bool:
        """Whether the next token begins a factor that is multiplied without a sign."""
        token = self.next
        if token.kind == "scale":
            return True
        if token.kind in ("name", "const"):
            alone = value[0] == "num" and token.value in UNITS
            if alone and (self.glued_units or token.spaced):
                after = self.after
                return not (
                    after is END or after.kind == "word" or after.value in (",", ";", "/", "^", ")", "]", "and")
                )
            if token.spaced and self.after.kind == "word":  # 18 a day
                return False
            return value[0] != "deg"
        if token.kind == "fn":
            return True
        opening = ("(", "\\lfloor", "\\lceil", "\\frac", "\\sqrt", "\\binom", "{", "[")
        return self.at(*opening) or (self.at("|") and not self.bars)

    def factor(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("is nested too deeply")
        if sign := self.take("-", "+", "\\pm", "\\mp"):
            inner = self.scalar(self.factor())
            value = inner if sign == "+" else ("neg", inner) if sign == "-" else (_BOTH[sign], integer(0), inner)
        elif self.next.kind == "cur":
            self.currency = self.next.value
            self.place += 1
            value = self.factor()
        else:
            value = self.postfix(self.atom())
        self.depth -= 1
        return value

    def postfix(self, value: Node) -> Node:
        while True:
            if mark := self.take("!", "%", "\\degree"):
                value = ({"!": "fact", "%": "pct", "\\degree": "deg"}[mark], self.scalar(value))
            elif self.take("^"):
                value = ("pow", self.scalar(value), self.script())
            elif self.next.kind == "scale":
                scale = integer(self.next.value)
                self.place += 1
                value = ("mul", self.scalar(value), scale)
            else:
                return value

    def script(self) -> Node:
        """Parses an exponent: a group, or one signed atom (to the right: 2^3^2 is 2^9)."""
        if sign := self.take("-", "+"):
            inner = self.script()
            return ("neg", inner) if sign == "-" else inner
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("is nested too deeply")
        value = self.scalar(self.atom(alone=True))
        if self.take("!"):
            value = ("fact", value)
        if self.take("^"):
            value = ("pow", value, self.script())
        self.depth -= 1
        return value

    def atom(self, alone: bool = False) -> Node:
        token = self.next
        if token.kind == "num":
            self.place += 1
            return ("num", *token.value) if alone else self.mixed(token)
        if token.kind == "name":
            self.place += 1
            return ("name", token.value + self.subscript())
        if token.kind == "const":
            self.place += 1
            return ("const", token.value)
        if token.kind == "fn":
            self.place += 1
            return self.function(token.value)
        if token.kind == "begin":
            return self.matrix()
        if self.at("(", "[", "{", "\\{"):
            return self.brackets()
        if self.take("|"):
            self.bars += 1
            value = self.scalar(self.total())
            self.need("|")
            self.bars -= 1
            return ("fn", "abs", value)
        if command := self.take("\\lfloor", "\\lceil", "\\frac", "\\sqrt", "\\binom", "\\emptyset", "\\Reals"):
            if command in _CLOSING:
                value = self.scalar(self.total())
                self.need(_CLOSING[command][0])
                return ("fn", _CLOSING[command][1], value)
            return {"\\emptyset": ("set",), "\\Reals": _REALS}.get(command) or self.function(command[1:])
        raise Unreadable("lacks a value")

    def mixed(self, token: Token) -> Node:
        """Parses a number, which may have a base (1011_2) or a proper fraction (1 1/2, 1\\frac12) after it."""
        value, places, _ = token.value
        if self.at("_"):
            base = self.subscript().strip("_{}")
            digits = str(value.numerator)
            if places is not None or value.denominator != 1 or not base.isdigit() or not 2 <= int(base) <= 36:
                raise Unreadable("has a subscript")
            if any(int(digit) >= int(base) for digit in digits):
                raise Unreadable("has a digit above its base")
            return integer(int(digits, int(base)))
        whole = ("num", *token.value)
        start = self.place
        if places is None and value.denominator == 1:
            try:
                part = self.proper_fraction()
            except Unreadable:
                part = None
            if part is not None:
                return ("num", value + part, None, 0)
        self.place = start
        return whole

    def proper_fraction(self) -> Fraction | None:
        top: Node
        bottom: Node
        if self.take("\\frac"):
            top, bottom = self.argument(), self.argument()
        elif self.next.kind == "num" and self.next.spaced:
            top = ("num", *self.next.value)
            self.place += 1
            if not self.take("/") or self.next.kind != "num":
                return None
            bottom = ("num", *self.next.value)
            self.place += 1
        else:
            return None
        if top[0] != "num" or bottom[0] != "num" or top[2] is not None or not 0 < top[1] < bottom[1]:
            return None
        return top[1] / bottom[1]

    def subscript(self) -> str:
        """Consumes _x or _{...}; returns it as text."""
        if not self.take("_"):
            return ""
        inside, braced = "_", bool(self.take("{"))
        while not (braced and self.take("}")):
            if self.next is END:
                raise Unreadable("lacks an index")
            inside += str(self.next.value[0] if self.next.kind == "num" else self.next.value)
            self.place += 1
            if not braced:
                break
        return inside

    # --- functions ---

    def argument(self) -> Node:
        return self.scalar(self.atom(alone=True))

    def function(self, name: str) -> Node:
        if name == "frac":
            return ("div", self.argument(), self.argument())
        if name == "binom":
            first = self.atom(alone=True)
            pair = first[1:] if first[0] == "tuple" and len(first) == 3 else (first, self.argument())
            return ("fn", "binom", *map(self.scalar, pair))
        if name in ("sqrt", "cbrt"):
            degree = integer(3 if name == "cbrt" else 2)
            if self.take("["):
                degree = self.scalar(self.total())
                self.need("]")
            return ("pow", self.argument(), ("div", integer(1), degree))
        base = None
        if name == "log" and self.take("_"):
            base = self.argument()
        power = self.script() if self.take("^") else None
        if power == ("neg", integer(1)) and name in ("sin", "cos", "tan", "sinh", "cosh", "tanh"):
            name, power = "arc" + name, None
        if self.at("(", "{"):
            value = self.argument()
        else:
            value = self.scalar(self.factor())
            while self.next.kind in ("name", "const") or self.at("\\frac", "\\sqrt"):
                value = ("mul", value, self.scalar(self.factor()))
        result = ("fn", name, value) if base is None else ("div", ("fn", "ln", value), ("fn", "ln", base))
        return result if power is None else ("pow", result, power)

    @abstractmethod
    def brackets(self) -> Node:
        """Reads what stands in brackets."""

    @abstractmethod
    def matrix(self) -> Node:
        """Reads a matrix."""
