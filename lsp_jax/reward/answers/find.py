"""Where a text states its result.

Marks, in this order, wherever in the text they stand: the last \\boxed{} that is not empty, the last <answer>, the last
####. Of several marked results the last counts, never one of them. A model's answer without a mark is searched from its
end: the last "answer is", then the last line with a formula, something bold or a number. A data row's answer never is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lsp_jax.reward.answers.text import MAX_RESULT, one_spelling

MAX_TEXT = 200_000
"""Characters at the end of an answer that are searched."""
_LONGEST_LINE = 400  # of a line that may be a result as a whole

_BOX = re.compile(r"\\?\\(?:boxed|fbox)\s{0,9}(?:\{|(?=[\w$-]))")
_TAGGED = re.compile(r"<((?:final_?)?answer)>", re.IGNORECASE)
_LABEL = re.compile(r"(?:the )?(?:final |correct )?(?:answer|result|solution)s?\W*", re.IGNORECASE)
_ANNOUNCED = re.compile(
    r"(?<!to )(?<!To )\b(?:answer|final (?:result|value|total|solution|count|amount)|correct (?:option|choice))s?\b"
    r"[^\n:=]{0,80}?(?:\b(?:is|are|equals|be|was)\b|:|=)[\s*_:`]*",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<![\s.])[.!?](?=\s|[*_`\"')]*$|[*_`\"')]+\s)")
_REMARK = re.compile(
    r",\s|;|\s[(-]+\s?(?=[A-Za-z])|\s(?:because|since|as|so|which|where|when|if|after|for|in|per|each)\s"
)
_SEGMENT = re.compile(
    r"\$\$([^$\n]{1,400})\$\$|\$(?! )([^$\n]{1,400})(?<! )\$(?!\d)|\\\(([^\n]{1,400}?)\\\)|\\\[([^\n]{1,400}?)\\\]"
    r"|\*\*([^*\n]{1,200})\*\*|(?<!`)`([^`\n]{1,200})`"
)
_QUOTE = re.compile(r"^[ \t]{0,3}>[ \t]", re.MULTILINE)
DENIED = re.compile(r"\b(?:not|never|no|nor|cannot|wrong|incorrect)\b|n't\b", re.IGNORECASE)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,} [A-Za-z]{2,}")  # two words: "$18 a day and $" is no formula
_NUMBER = re.compile(
    r"(?<![\w.])(?<!\d,)(?:[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+(?:/[0-9]++)?+(?![A-Za-z_]*+[0-9])"
    r"(?!\.[0-9])(?:\s?%)?|(?<![\w.])\.[0-9]++"
)


class Found(NamedTuple):
    """A text's result, or where it may be."""

    candidates: tuple[str, ...]
    """The first that can be read counts."""
    marked: bool


def final_answer(text: str) -> tuple[str, bool]:
    """Returns (result, True) for a marked result, else (text, False)."""
    thought, _, said = text.rpartition("</think>")
    text = one_spelling((said if thought and said.strip() else text)[-MAX_TEXT:])
    boxed = _boxed(text)
    if boxed is not None:
        return boxed, True
    tags = list(_TAGGED.finditer(text))
    if tags:
        inside = text[tags[-1].end() :]
        end = inside.lower().find(f"</{tags[-1].group(1).lower()}>")
        return (inside[:end] if end >= 0 else inside).strip(), True
    _, marked, after = text.rpartition("####")
    if marked:
        lines = [line.strip() for line in after[: 2 * MAX_RESULT].split("\n") if line.strip(" *_`#$\r\t")]
        first = lines[0] if lines else ""
        return (lines[1] if len(lines) > 1 and _LABEL.fullmatch(first.strip("*_ ")) else first), True
    return text, False


def _boxed(text: str) -> str | None:
    """Returns the content of the last \\boxed{} that is not empty; None if there is none or the last is not closed."""
    for box in reversed(list(_BOX.finditer(text))):
        if not box.group().endswith("{"):  # \boxed 7
            return text[box.end() : box.end() + MAX_RESULT].split()[0].rstrip(".,$")
        depth, escaped = 1, False
        for place in range(box.end(), min(len(text), box.end() + 2 * MAX_RESULT)):
            character = text[place]
            depth += 0 if escaped else {"{": 1, "}": -1}.get(character, 0)
            escaped = character == "\\" and not escaped
            if depth == 0:
                content = text[box.end() : place].strip()
                break
        else:
            return None
        if content:
            return content
    return None


def find_result(text: str) -> Found:
    """Returns the marked result of a model's answer, else what its last sentences state."""
    result, marked = final_answer(text)
    if marked:
        return Found((result,), True)
    if _BOX.search(result):  # cut off
        return Found((), False)
    announced = [match.end() for match in _ANNOUNCED.finditer(result)]
    if announced:
        rest = result[announced[-1] : announced[-1] + MAX_RESULT].lstrip().split("\n")[0].strip()
        sentence = _SENTENCE.split(rest, maxsplit=1)[0].strip()
        if DENIED.search(sentence):
            return Found((rest, sentence), False)
        if sentence:
            return Found((rest, sentence, _REMARK.split(sentence, maxsplit=1)[0], *_parts(sentence, first=True)), False)
    result = _QUOTE.sub("", result)
    whole = (result.strip(),) if len(result.strip()) <= _LONGEST_LINE else ()
    return Found((*whole, *_last_line(result)), False)


def _last_line(text: str) -> tuple[str, ...]:
    """Returns what the last line with a formula or a number states."""
    for line in reversed(text.split("\n")):
        line = line.strip()
        parts = _parts(line, first=False)
        if parts:
            whole = (line, line.rpartition("=")[2].strip()) if len(line) <= _LONGEST_LINE else ()
            return (*(part for part in whole if part), *parts)
    return ()


def _parts(line: str, *, first: bool) -> tuple[str, ...]:
    """Returns the formulas and bold parts of a line that have no prose, then its first or last number."""
    segments = [next(filter(None, match.groups())) for match in _SEGMENT.finditer(line)]
    segments = [part for part in segments if not _PROSE.search(part) and (any(map(str.isdigit, part)) or "\\" in part)]
    numbers = list(_NUMBER.finditer(line))
    chosen = numbers[:1] if first else numbers[-1:]
    ordered = segments if first else segments[::-1]
    return (*ordered, *(("-" if _negative(line[: match.start()]) else "") + match.group() for match in chosen))


def _negative(before: str) -> bool:
    """Whether the text before a number ends in its minus sign, a currency sign between them or not."""
    before = before.rstrip("$£€ \\") if before.endswith(("$", "£", "€")) else before
    if not before.endswith("-"):
        return False
    touching, operand = before[-2:-1], before[:-1].rstrip()[-1:]
    return not (touching.isalpha() or operand.isdecimal() or operand == ")")
