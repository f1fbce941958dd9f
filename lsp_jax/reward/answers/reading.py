"""Golds and model answers as trees: a gold is what it is, a model's answer may name its result in a sentence."""

from __future__ import annotations

import re

from lsp_jax.reward.answers.compare import same
from lsp_jax.reward.answers.expressions import Node
from lsp_jax.reward.answers.find import DENIED, final_answer, find_result
from lsp_jax.reward.answers.syntax import parse
from lsp_jax.reward.answers.text import MAX_RESULT, folded, one_latex, one_spelling, without_markup
from lsp_jax.reward.answers.tokens import Unreadable

MAX_TEXT_WORDS = 8
"""Words of a gold without a mark that is text; a longer one is prose, in which no result is searched."""

_REMARK = re.compile(r"(?<=\S) \((?!or |not )[A-Za-z][A-Za-z' -]{2,60}\)$")
_WORDS = re.compile(r"(?:[A-Za-z][A-Za-z'-]{0,20},? ){1,20}(?=[-$£€¥(]?[$]?[\d.\\])")
_BOUND = re.compile(r"\b(?:or|and|than|least|most|over|under|between|from|more|less|up to|either)\b", re.IGNORECASE)
_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?([A-J])(?:\)[.:]?|[.:])\s+(\S.{0,300})", re.IGNORECASE)
_LETTER = re.compile(r"(?:(?:option|choice|answer)\s+)?\(?([A-Ja-j])\)?[.:]?", re.IGNORECASE)
_LABEL = re.compile(
    r"(?:[A-Za-z][A-Za-z' ]{0,80}?)?"
    r"(?:\b(?:is|are|equals|was|be)\b(?: (?:equal to|exactly|therefore))?|[A-Za-z)]\s?[:=])\s*:?\s*"
)
_NO_ANSWER = re.compile(
    r"(?:see|refer|look|check|cf|as shown|shown|proof|prove|todo|tbd|n/?a|answers? (?:may|will) vary|answers? vary"
    r"|unknown answer|none given|null|nan)\b.*|[?\-.\s]*",
    re.IGNORECASE,
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_STATEMENT = re.compile(r"\b(?:is|are|was|were|therefore|because|so|thus|hence)\b", re.IGNORECASE)


def tidy(result: str) -> str:
    """Returns a result in one spelling, without markup.

    Raises:
        Unreadable: it has more than `MAX_RESULT` characters.
    """
    if len(result) > MAX_RESULT:
        raise Unreadable("is too long")
    return without_markup(one_latex(without_markup(one_spelling(result))))


def _tree(text: str, commas: str = "", glued_units: bool = False) -> Node:
    if "\\ldots" in text:  # what is left out is not known: equal only to the same text
        return ("text", "".join(text.split()))
    return _both_signs(parse(text, commas, glued_units))


def _both_signs(node: Node) -> Node:
    """Returns the list of two values of an expression or equation with \\pm; other nodes as they are."""
    if node[0] == "list":
        items = [_both_signs(item) for item in node[1:]]
        flat = [part for item in items for part in (item[1:] if item[0] == "list" else (item,))]
        return ("list", *flat)
    upper, lower = _signed(node, "add", "sub"), _signed(node, "sub", "add")
    return node if upper == lower else ("list", upper, lower)


def _signed(node: Node, plus: str, minus: str) -> Node:
    if node[0] in ("plusminus", "minusplus"):
        left, right = (_signed(part, plus, minus) for part in node[1:])
        sign = plus if node[0] == "plusminus" else minus
        return ("add", left, right if sign == "add" else ("neg", right))
    return tuple(
        _signed(part, plus, minus)
        if isinstance(part, tuple) and part and isinstance(part[0], str)
        else tuple(_signed(each, plus, minus) if isinstance(each, tuple) else each for each in part)
        if isinstance(part, tuple)
        else part
        for part in node
    )


def read_gold(text: str) -> Node | None:
    """Returns the tree of a data row's answer; None if it cannot be read.

    The result is what a mark of the data's format names (\\boxed{}, ####), else the whole text.
    """
    result, marked = final_answer(text)
    try:
        plain = tidy(result if marked else text)
    except Unreadable:
        return None
    if not plain or _NO_ANSWER.fullmatch(plain):
        return None
    try:
        return _tree(plain)
    except Unreadable:
        pass
    choice = _CHOICE.fullmatch(plain)
    if choice:
        rest = read_gold(choice.group(2))
        return ("choice", ("name", choice.group(1).upper()), *([rest] if rest else []))
    letter = _LETTER.fullmatch(plain)
    if letter:
        return ("name", letter.group(1))
    words = folded(plain)
    stated = _STATEMENT.search(words) and any(map(str.isdigit, words))
    prose = not marked and (stated or len(_WORD.findall(plain)) > MAX_TEXT_WORDS)
    return None if prose or not any(map(str.isalnum, words)) else ("text", words)


def read_answer(text: str, gold: Node) -> list[Node]:
    """Returns the readings of a model's one result: several only where its commas or a unit are ambiguous."""
    found = find_result(text)
    read: list[Node] = []
    for candidate in found.candidates:
        try:
            plain = tidy(candidate)
        except Unreadable:
            continue
        if not plain:
            continue
        trees = _readings(plain, gold)
        if gold[0] in ("text", "choice", "name"):
            read.append(("text", "".join(plain.split()) if "\\ldots" in plain else folded(plain)))
            letter = _LETTER.fullmatch(plain)
            read += [("name", letter.group(1).upper())] if letter else []
        if trees and not found.marked and plain.endswith("!") and gold[0] != "fact":
            trees = _readings(plain.rstrip("!"), gold)  # the end of a sentence
        read += trees
        if trees:
            break
    return read


def _readings(plain: str, gold: Node) -> list[Node]:
    """Returns the trees of a result, of the part after its label if only that can be read."""
    choice = _CHOICE.fullmatch(plain)
    if choice:
        inside = [reading for reading in _readings(choice.group(2), gold) if reading[0] != "choice"]
        return [("choice", ("name", choice.group(1).upper()), *inside[:1])]
    for text in (plain, _REMARK.sub("", plain), _unlabelled(plain), _after_words(plain)):
        if not text:
            continue
        read: list[Node] = []
        for commas, glued in (("", False), ("", True), *((c, False) for c in _ambiguous(text, gold))):
            try:
                tree = _tree(text, commas, glued)
            except Unreadable:
                continue
            if tree not in read:
                read.append(tree)
        if read:
            return read
    return []


def _ambiguous(text: str, gold: Node) -> tuple[str, ...]:
    """Returns how else the commas can be read: for a gold that is one number as part of it, else as a list's."""
    if "," not in text:
        return ()
    return ("list",) if gold[0] in ("list", "set", "tuple", "interval", "union") else ("thousands", "decimal")


def _unlabelled(plain: str) -> str:
    """Returns what follows "Total:" or "the answer is"; empty without, or if the label denies."""
    label = _LABEL.match(plain)
    if label is None or DENIED.search(label.group()) or DENIED.search(plain):
        return ""
    return without_markup(plain[label.end() :])


def _after_words(plain: str) -> str:
    """Returns what follows the words of a sentence such as "Janet makes $18 a day"; empty for another text."""
    words = _WORDS.match(plain)
    if words is None or DENIED.search(plain) or _BOUND.search(plain):
        return ""
    return _REMARK.sub("", plain[words.end() :])


def equal(gold: Node, answer: str) -> bool:
    """Whether a model's answer has the gold's result. May take long, and raise any exception of sympy."""
    return any(same(gold, reading) for reading in read_answer(answer, gold))
