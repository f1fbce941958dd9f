"""The grammar of results: from tokens to a tree of tuples, whose first element names the node.

Scalars: num (value, places, significant digits), name, const (pi, e, i, oo), add, mul, div, pow (two), neg, fact, pct,
deg (one), plusminus, minusplus (two), fn (name, arguments). Then qty (scalar or sequence, words), list, set, tuple,
ratio (elements), interval (ends, left open, right open), union (sets), matrix (rows), rel (operators, sides), and, of
`reading`, text (folded words) and choice (letter, rest).
"""

from __future__ import annotations

from lsp_jax.reward.answers.expressions import END, MAX_DEPTH, SCALARS, Expressions, Node
from lsp_jax.reward.answers.tokens import Unreadable, tokens, words_of
from lsp_jax.reward.answers.units import UNITS

MAX_WORDS = 8

RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\approx": "~", "\\in": "in"}
_BLOCKED = words_of(
    "not no but nor isn't wrong incorrect false except instead than maybe perhaps if unless vs versus "
    "through until till times plus divided"
)


def parse(text: str, commas: str = "", glued_units: bool = False) -> Node:
    """Returns the tree of a result; `glued_units`: 5m is five metres, not a product.

    Raises:
        Unreadable: not of this grammar.
    """
    return _Parser(tokens(text, commas), glued_units).whole()


class _Parser(Expressions):
    """Lists, relations, units, brackets."""

    def whole(self) -> Node:
        items = self.items()
        if self.next is not END:
            raise Unreadable("has more than a result")
        return items[0] if len(items) == 1 else ("list", *items)

    def items(self) -> list[Node]:
        found = [self.item()]
        while self.take(",", ";"):
            self.take("and")
            if self.next is END:
                break
            found.append(self.item())
        while self.take("and"):
            found.append(self.item())
        return found

    def item(self) -> Node:
        self.take("\\approx")
        operators, sides = [], [self.side()]
        while self.at(*RELATIONS):
            operators.append(RELATIONS[self.take(*RELATIONS)])
            sides.append(self.side())
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def side(self) -> Node:
        """Parses sum [units], ratios and unions of it."""
        self.currency = ""
        value: Node = self.total()
        if self.at(":", "\\cup"):
            kind, parts = "union" if self.at("\\cup") else "ratio", [value]
            while self.take(":" if kind == "ratio" else "\\cup"):
                parts.append(self.total())
            value = (kind, *parts)
        words: Node = self.words(value)
        if self.currency and not words:
            words = ("words", self.currency)
        if value[0] == "deg":
            value, words = value[1], words or ("words", "degree")
        return ("qty", value, words) if words else value

    def words(self, value: Node) -> tuple[str, ...]:
        """Returns the words after a value: a unit, or only words."""
        found: list[str] = []
        if self.next.kind == "word" and self.next.value.lower() == "to":
            raise Unreadable("is a range")
        while True:
            token = self.next
            if token.kind in ("word", "cur"):
                if token.value.lower() in _BLOCKED:
                    raise Unreadable("is not one result")
                found.append(token.value)
            elif token.kind in ("name", "const") and (
                found or token.value in UNITS or value[0] == "deg" or self.after.kind == "word"
            ):
                degrees = {"C": "celsius", "F": "fahrenheit"} if value[0] == "deg" and not found else {}
                found.append(str(degrees.get(token.value, token.value)))
            elif (found or self.after.kind == "word") and self.at("/", "*", "-", "+", "(", ")", "'"):
                if token.value == ")" and "(" not in found:
                    break
                if token.value == "+":
                    raise Unreadable("is not one result")
                found.append(token.value)
            elif found and self.at("^"):
                self.place += 1
                braced = bool(self.take("{"))
                if self.next.kind != "num":
                    raise Unreadable("has a power of a word")
                found.append(f"^{self.next.value[0]}")
                self.place += 1
                if braced:
                    self.need("}")
                continue
            else:
                break
            self.place += 1
        if (
            len(found) > MAX_WORDS
            or (found and value[0] not in SCALARS | {"ratio", "tuple", "list", "set"})
            or (found and value[0] == "name")
        ):
            raise Unreadable("has words after it")
        kept = [word for word in found if word not in ("-", "(", ")", "'")]
        return ("words", *kept) if kept else ()

    def brackets(self) -> Node:
        opening = self.take("(", "[", "{", "\\{")
        if opening == "\\{" and self.take("\\}"):
            return ("set",)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("is nested too deeply")
        outer, self.bars, self.currency = (self.bars, self.currency), 0, ""
        items = self.items()
        closing = self.take(*{"{": ("}",), "\\{": ("\\}",)}.get(opening, (")", "]")))
        if not closing:
            raise Unreadable("lacks a bracket")
        self.depth -= 1
        self.bars, self.currency = outer
        if opening in ("{", "\\{"):
            return items[0] if len(items) == 1 and opening == "{" else ("set", *items)
        if len(items) == 1:
            if opening + closing in ("()", "[]"):
                return items[0]
            raise Unreadable("has brackets that do not match")
        if opening == "[" and closing == "]":
            rows = [_row(item) for item in items]
            if all(rows) and len({len(row) for row in rows}) == 1:
                return ("matrix", tuple(rows), "matrix")
        if opening + closing == "()" or (len(items) > 2 and opening + closing == "[]"):
            return ("tuple", *items)
        if len(items) == 2:
            return ("interval", *items, opening == "(", closing == ")")
        raise Unreadable("has brackets that do not match")

    def matrix(self) -> Node:
        name = self.next.value
        if "matrix" not in name and name != "array":
            raise Unreadable(f"has {name}")
        self.place += 1
        rows: list[list[Node]] = [[]]
        while self.next.kind != "end":
            rows[-1].append(self.total())
            if self.take("row"):
                if self.next.kind != "end":
                    rows.append([])
            elif not self.take("&") and self.next.kind != "end":
                raise Unreadable("has a matrix that does not end")
        self.place += 1
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("has rows of different lengths")
        return ("matrix", tuple(map(tuple, rows)), "determinant" if name[0] in "vV" else "matrix")


def _row(node: Node) -> tuple[Node, ...]:
    """The elements of a row in brackets; empty for another node."""
    if node[0] == "interval":
        return node[1:3] if not (node[3] or node[4]) else ()
    return node[1:] if node[0] == "tuple" else ()
