"""Characters and markup of an answer, in one spelling: digits of all scripts, signs, LaTeX spacing, Markdown.

Model output is untrusted: every pattern here is linear, or is applied to at most `MAX_RESULT` characters.
"""

from __future__ import annotations

import re
import unicodedata

MAX_RESULT = 1000
"""Characters of a result; longer ones are not read."""

_SIGNS = {
    **dict.fromkeys("−﹣－‒–—―➖˗", "-"),
    **dict.fromkeys("×✕✖⨯∗⋆·⋅∙・﹡＊", "*"),
    **dict.fromkeys("÷∕⁄／", "/"),
    **dict.fromkeys("，、،︐﹐", ","),
    **dict.fromkeys("。．﹒｡٫", "."),
    **dict.fromkeys("٬", ","),
    **dict.fromkeys("：﹕∶", ":"),
    **dict.fromkeys("；﹔؛", ";"),
    **dict.fromkeys("％﹪٪", "%"),
    **dict.fromkeys("‘’‛′", "'"),
    **dict.fromkeys("“”„«»「」『』", '"'),
    **dict.fromkeys("【〔", "["),
    **dict.fromkeys("】〕", "]"),
    **dict.fromkeys("⟨〈", "("),
    **dict.fromkeys("⟩〉", ")"),
    **dict.fromkeys("≈≃≅∼", "\\approx "),
    **dict.fromkeys("≤⩽≦", "\\le "),
    **dict.fromkeys("≥⩾≧", "\\ge "),
    **dict.fromkeys("∅⌀", "\\emptyset "),
    **dict.fromkeys("πΠ", "\\pi "),
    **dict.fromkeys("°º˚", "\\degree "),
    "≠": "\\ne ",
    "±": "\\pm ",
    "∓": "\\mp ",
    "√": "\\sqrt ",
    "∛": "\\sqrt[3] ",
    "∞": "\\infty ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "㎡": "m^2",
    "㎥": "m^3",
    "ℝ": "\\mathbb{R}",
    "θ": "\\theta ",
    "α": "\\alpha ",
    "β": "\\beta ",
    "γ": "\\gamma ",
    "λ": "\\lambda ",
    "μ": "\\mu ",
    "σ": "\\sigma ",
    "φ": "\\phi ",
    "ω": "\\omega ",
    "⌊": "\\lfloor ",
    "⌋": "\\rfloor ",
    "⌈": "\\lceil ",
    "⌉": "\\rceil ",
    "∴": "\\therefore ",
    "⇒": "\\Rightarrow ",
    "→": "\\to ",
    "…": "\\ldots ",
    "⋯": "\\ldots ",
    "℃": "\\degree C",
    "℉": "\\degree F",
    "\u00a0": " ",
    "\b": "\\b",  # JSON that was not escaped turns \boxed into a backspace and oxed
    "\f": "\\f",
}
_OPEN, _CLOSE = "\ue000", "\ue001"  # around each raised digit; ends and beginnings that touch are merged


def _one_spelling(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category in ("Cf", "Co", "Cs"):  # invisible, private, half a pair
        return ""
    if category == "Zs":
        return " "
    if "VARIATION SELECTOR" in unicodedata.name(character, ""):
        return ""
    kind, _, parts = unicodedata.decomposition(character).rpartition(">")
    plain = "".join(chr(int(part, 16)) for part in parts.split()) if parts else character
    plain = "".join(_SIGNS.get(c, c) for c in plain)
    if kind == "<super" and category != "Lo":
        return f"{_OPEN}{plain}{_CLOSE}"
    if kind == "<sub":
        return f"_{{{plain}}}"
    if kind == "<fraction":
        return f" {plain}"
    normal = unicodedata.normalize("NFKC", character)
    if category == "So" and normal == character:  # emoji and ornaments
        return " "
    return "".join(_SIGNS.get(c, c) for c in normal)


def one_spelling(text: str) -> str:
    """Returns the text with the digits, signs and punctuation of all scripts in ASCII or as LaTeX commands."""
    if not text.isascii() or "\b" in text or "\f" in text:
        text = text.translate({ord(c): _one_spelling(c) for c in set(text) if not c.isascii() or c in "\b\f"})
        text = text.replace(_CLOSE + _OPEN, "").replace(_OPEN, "^{").replace(_CLOSE, "}").replace("^{-}", "-")
    return text


_SPACES = re.compile(r"(?<!\\)\\(?:[,:;> ]|quad\b|qquad\b|thinspace\b|enspace\b|hfill\b|newline\b)|~")
_NOTHING = re.compile(
    r"(?<!\\)\\(?:!|left\b|right\b|bigl?\b|bigr\b|Bigl?\b|Bigr\b|biggl?\b|biggr\b|displaystyle\b|textstyle\b|limits\b|middle\b"
    r"|mathopen\b|mathclose\b|nolimits\b|centering\b|boldmath\b|mathstrut\b|strut\b)\.?"
)
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|emph|underline|mbox|hbox|mathrm|mathbf|mathit|mathsf"
    r"|mathtt|mathcal|boldsymbol|bm|operatorname\*?|vec|hat|tilde|mathop|mathord|mathbin|mathrel|phantom|ensuremath"
    r"|boxed|fbox|framebox|tag\*?|color\s{0,9}\{[a-z]{1,20}\}|textcolor\s{0,9}\{[a-z]{1,20}\})\s{0,9}\{([^{}]*)\}"
)
_FRACTION = re.compile(r"\\[dtcs]frac\b|\\[dt]frac(?=\d)|\\cfrac(?=\d)")
_ALIASES = (
    (re.compile(r"\\\\(?=[A-Za-z$%])"), r"\\"),  # a backslash that was escaped twice
    (re.compile(r"\{\s{0,9},\s{0,9}\}|,\\[!,]"), ","),
    (_FRACTION, r"\\frac"),
    (re.compile(r"\\frac ?(\d) ?(?=\{|\\|[A-Za-z])"), r"\\frac{\1}"),
    (re.compile(r"\\frac ?(\d) ?(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac ?(\{[^{}]*\}) ?(\d)"), r"\\frac\1{\2}"),
    (re.compile(r"\\dbinom\b|\\tbinom\b"), r"\\binom"),
    (re.compile(r"\\(?:cdot|times|ast|bullet)(?![A-Za-z])"), "*"),
    (re.compile(r"(?<=\d) ?[xX] ?(?=\d)"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\^\s{0,9}\{\s{0,9}\\circ\s{0,9}\}|\^\s{0,9}\\circ(?![A-Za-z])|\\textdegree\b"), r"\\degree "),
    (re.compile(r"\\mathbb\s{0,9}(?:\{\s{0,9}R\s{0,9}\}|R\b)|\\R\b"), r"\\Reals "),
    (re.compile(r"\\(?:leq|leqslant|leqq)(?![A-Za-z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|geqq)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])|!=|/="), r"\\ne "),
    (re.compile(r"(?<=\d) and (?:a|one) half\b"), " 1/2"),
    (re.compile(r"(?<=\d) and (?:a|one) quarter\b"), " 1/4"),
    (re.compile(r"(?<=\d) and three quarters\b"), " 3/4"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:simeq|sim|cong|doteq)(?![A-Za-z])"), r"\\approx "),
    (re.compile(r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])|\\\|"), "|"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:dots|cdots|dotsc|dotsb|hdots)(?![A-Za-z])|\.\.\.+"), r"\\ldots "),
    (re.compile(r"\\(?:pounds|textsterling)(?![A-Za-z])"), "£"),
    (re.compile(r"\\(?:euro|texteuro)(?![A-Za-z])"), "€"),
    (re.compile(r"\\([%#&$])"), r"\1"),
    (re.compile(r"\\(?:imath|mathrm\s?i)(?![A-Za-z])"), "i"),
    (re.compile(r"\bU\.?S\.?\s?\$|\b(?:US|CA|AU|C|A|NZ|HK|S)\$"), "$"),
)


def one_latex(result: str) -> str:
    """Returns a result in one spelling of LaTeX: no spacing commands, no text wrappers, one name for each command."""
    for pattern, instead in _ALIASES[:2]:
        result = pattern.sub(instead, result)
    result = _NOTHING.sub("", _SPACES.sub(" ", result))
    for pattern, instead in _ALIASES[2:]:
        result = pattern.sub(instead, result)
    for _ in range(4):  # wrappers in wrappers
        result, found = _WRAPPED.subn(r" \1 ", result)
        if not found:
            break
    return " ".join(result.split())


_STRUCK = re.compile(r"~~[^~\n]{1,200}~~|<(?:del|s|strike)>[^<\n]{0,200}</(?:del|s|strike)>")
_LINK = re.compile(r"!?\[([^\[\]\n]{1,200})\]\((?:https?:|#|/|mailto:)[^()\s]{0,300}\)")
_TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9_-]{0,20}(?:\s[^<>\n]{0,100})?/?>")
_EMPHASIS = re.compile(r"(?<![\w)\]}*!])(\*{1,3}|_{1,3}|`{1,3})(?=[^\s*_`])([^*_`\n]{0,300}?[^\s*_`\\])\1(?![\w({*])")
_AROUND = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("***", "***"),
    ("**", "**"),
    ("__", "__"),
    ("```", "```"),
    ("`", "`"),
    ("*", "*"),
    ("_", "_"),
    ('"', '"'),
    ("''", "''"),
    ("'", "'"),
    ("{", "}"),
)
_LEADING = re.compile(
    r"(?:#{1,6}\s|[=:](?!=)|\\(?:therefore|Rightarrow|implies|to|approx|boxed(?!\s{0,9}\{))(?![A-Za-z])|->|~(?=\s?[\d$])"
    r"|\\item\b|[*•]\s)\s{0,99}"
)
_FENCE = re.compile(r"^```[a-z]{0,12}\n|\n```$")


def without_markup(result: str) -> str:
    """Returns a result without Markdown, HTML tags, math delimiters around the whole, and marks at both ends."""
    result = _FENCE.sub("", _STRUCK.sub("", result.strip())).strip()
    result = _TAG.sub(" ", _LINK.sub(r"\1", result))
    for _ in range(8):
        before = result
        result = _LEADING.sub("", result, count=1) if _LEADING.match(result) else result
        result = _EMPHASIS.sub(r"\2", result.strip())
        result = result.rstrip(",;: \n").strip()
        if result.endswith(".") and not result.endswith(("..", " .")):
            result = result[:-1].rstrip()
        for left, right in _AROUND:
            middle = result[len(left) : len(result) - len(right)]
            whole = result.startswith(left) and result.endswith(right) and len(result) > len(left) + len(right)
            if whole and left.strip("{") not in middle and middle.count("{") == middle.count("}") and _pairs(middle):
                result = middle.strip()
        result = result.removesuffix("\\\\").rstrip()
        if result == before:
            break
    return result


def _pairs(text: str) -> bool:
    """Whether no brace in the text closes one outside it."""
    depth = 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


_FOLD = re.compile(r"\\|[{}$\"`*_]|\s*[.,;:!?](?=\s|$)|^(?:the|an|a)\s+(?=\w{2})")


_TIGHT = re.compile(r" ?([^\w ]) ?")


def folded(text: str) -> str:
    """Returns words without case, articles and punctuation, for the comparison of answers that are text."""
    return _TIGHT.sub(r"\1", " ".join(_FOLD.sub(" ", text.casefold()).split()))
