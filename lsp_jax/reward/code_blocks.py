"""The program in a chat answer: the block that defines what the tests call.

An answer may hold several fenced blocks (drafts, usage examples, output), stray or unclosed fences, prose around code
without a fence, and indented code. Every stretch of it that parses as Python is a candidate. The one that defines most
of the wanted names is the program, the last one among equals; statements of other stretches that define names it lacks
are added. Text is only parsed here, never executed.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

LONGEST = 100_000
"""Maximum characters of an answer that is searched; a longer one is taken as it is."""
_MARKS = 24  # marks that are considered, the last ones of an answer
_REACH = 6  # marks that a block may contain, as docstrings do
_JOINED = 200  # top-level lines that one statement may consist of, such as those of a docstring
_ATTEMPTS = 300  # attempts to join such lines in a stretch
_DEFINED = 4  # definitions of wanted names around which prose is removed, the last ones of a stretch

_MARK = re.compile(
    r"`{3,}|^[ \t>]*~{3,}|~{3,}[ \t]*$|</?(?:code|pre|answer|python|solution)>|\[/?PYTHON\]|\[BEGIN\]|\[DONE\]",
    re.MULTILINE | re.IGNORECASE,
)
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_TAG = re.compile(r"[ \t]*(?:(?:python|py)[\d.]*\b)?[ \t]*\n?", re.IGNORECASE)
_SURROGATE = re.compile("[\\ud800-\\udfff]")  # of no source file
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_BUILTINS = frozenset(dir(builtins))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*_FUNCTIONS, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom)
_CODE = re.compile(
    r"(?:def|class|async|import|from|if|for|while|with|try|return|raise)\b|@|[\w.\[\]]+\s*[-+*/|&]?=|[\w.]+\("
)
_ENDS = {("sys", "exit"), ("os", "_exit"), ("unittest", "main"), ("doctest", "testmod")}

Statements = Sequence[ast.stmt]


class Source(NamedTuple):
    """A stretch of an answer that parses as Python."""

    text: str
    statements: Statements
    place: int
    """Where it starts in the answer."""


def parse(text: str) -> list[ast.stmt] | None:
    """Returns the statements of `text`; None if it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes are the program's own affair
            return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def bound(statements: Iterable[ast.AST]) -> set[str]:
    """Returns the names that statements define at the top level, also within `if`, `try`, `for` and `with`."""
    names: set[str] = set()
    stack: list[ast.AST] = list(statements)
    while stack:
        node = stack.pop()
        names.update(_binds(node))
        if not isinstance(node, _SCOPES):
            stack.extend(ast.iter_child_nodes(node))
    return names


def _binds(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ExceptHandler):
        return [node.name] if node.name else []
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def free_names(statements: Iterable[ast.AST]) -> set[str]:
    """Returns the names that statements read and neither define, at any depth, nor find among Python's builtins."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    inner = {name for node in nodes for name in _binds(node)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - inner - _BUILTINS


def defines(statements: Statements, name: str) -> bool:
    """Whether statements define `name`, other than by a function without a body."""
    functions = [s for s in statements if isinstance(s, _FUNCTIONS) and s.name == name]
    return name in bound(statements) and not (functions and all(map(_is_stub, functions[-1].body)))


def extract_code(answer: str, wanted: Collection[str] = (), given: Collection[str] = ()) -> str:
    """Returns the program in an answer that defines the `wanted` names; it finds those in `given` elsewhere.

    Where nothing defines any of them: the last fenced Python block, else the last fenced block, else all of it.
    """
    return defining_code(answer, wanted, given) or _last_block(answer)


def defining_code(answer: str, wanted: Collection[str], given: Collection[str] = ()) -> str:
    """Returns the program in an answer that defines most of the `wanted` names; "" if there is none."""
    if not wanted or len(answer) > LONGEST or _SURROGATE.search(answer):
        return ""
    answer = answer.replace("\r\n", "\n").replace("\ufeff", "")
    named = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(wanted)))})\b")
    found = _best(_sources(answer, named), wanted) or _best(_loose_sources(answer, wanted), wanted)
    if found is None:
        return ""
    lacking = (free_names(found.statements) | set(wanted)) - bound(found.statements) - set(given)
    helpers = _helpers(answer, found, lacking, wanted) if lacking else []
    return "\n".join([*helpers, _without_examples(found, wanted)])


def stretches(answer: str, reach: int = _REACH) -> Iterator[tuple[str, int]]:
    """Yields (text, place) between any two marks of an answer at most `reach` apart, in the order of their starts."""
    marks = [(match.start(), match.end()) for match in _MARK.finditer(answer)][-_MARKS:]
    edges = [(0, 0), *marks, (len(answer), len(answer))]
    for number, (_, start) in enumerate(edges[:-1]):
        for end, _ in edges[number + 1 : number + 1 + reach]:
            text = answer[start:end]
            if start:  # what follows a fence in its line: a tag, or code
                yield text[_TAG.match(text).end() :], start  # pyright: ignore[reportOptionalMemberAccess]
                yield text.partition("\n")[2], start
            else:
                yield text, start


def _sources(answer: str, named: re.Pattern[str]) -> Iterator[Source]:
    for text, place in (*stretches(answer), *((match[1], match.start()) for match in _INLINE.finditer(answer))):
        if named.search(text) and (source := _read(text, place)):
            yield source


def _read(text: str, place: int) -> Source | None:
    """Parses a stretch, also one that is indented, quoted or a session of the interactive interpreter."""
    for variant in dict.fromkeys(_variants(text)):
        statements = parse(variant)
        if statements:
            return Source(variant, statements, place)
    return None


def _variants(text: str) -> Iterator[str]:
    yield text
    lines = [
        re.sub(r"^[ \t\u00a0\u3000]+", lambda m: re.sub(r"[\u00a0\u3000]", " ", m[0]), line)
        for line in text.split("\n")
    ]
    yield textwrap.dedent("\n".join(lines))
    real = [line for line in lines if line.strip()]
    prompts = [match[1] for line in lines if (match := re.match(r"\s*(?:>>>|\.\.\.)(?: (.*)|$)", line))]
    if prompts and any(line.lstrip().startswith(">>>") for line in real):
        yield "\n".join(line or "" for line in prompts)
    if real and all(line.lstrip().startswith(">") for line in real):
        yield textwrap.dedent("\n".join(re.sub(r"^\s*> ?", "", line) for line in lines))


def _loose_sources(answer: str, wanted: Collection[str]) -> Iterator[Source]:
    """Yields code without its prose, from stretches that hold a definition of a wanted name."""
    names = "|".join(map(re.escape, sorted(wanted)))
    definition = re.compile(
        rf"(?:^|(?<=[\s`:]))(?:(?:async\s+)?def\s+|class\s+)(?:{names})\b|^[ \t]*(?:{names})\s*=", re.MULTILINE
    )
    closed = [(fence.start(), fence.end() + len(text)) for fence, text, whole in _blocks(answer) if whole]
    for text, place in stretches(answer, 1):
        within = any(start <= place <= end for start, end in closed)
        regions: set[str] = set()
        for match in [*definition.finditer(text)][-_DEFINED:]:
            line = text.rfind("\n", 0, match.start()) + 1
            before = text[line : match.start()] + re.match(r"[ \t]*", match[0])[0]  # pyright: ignore[reportOptionalSubscript]
            if before.lstrip().startswith("#"):
                continue
            if before.strip():  # prose in the same line
                region = text[match.start() :]
            elif before:
                region = _indented(text, line, len(before))
            else:
                region = text
            code = _without_prose(region, strict=within) if region not in regions else ""
            regions.add(region)
            if statements := parse(code):
                yield Source(code, statements, place + match.start())


def _indented(text: str, line: int, depth: int) -> str:
    """Returns the lines around position `line` that are indented by `depth` or more, dedented; "" in a statement."""
    before, after = text[:line].split("\n")[:-1], text[line:].split("\n")

    def run(lines: Iterable[str]) -> Iterator[str]:
        for one in lines:
            if one.strip() and len(one) - len(one.lstrip()) < depth:
                return
            yield one

    above = list(run(reversed(before)))
    head = before[-1 - len(above)].strip() if len(above) < len(before) else ""
    if head.endswith(":") and parse(f"{head} pass"):  # of a class or a function, say, whose names are its own
        return ""
    return textwrap.dedent("\n".join([*reversed(above), *run(after)]))


def _without_prose(text: str, strict: bool) -> str:
    """Returns the top-level statements of `text` that parse by themselves, without the lines between them.

    `strict`: returns "" if a part that looks like code does not parse, as in a fenced block, which is code throughout.
    """
    lines = text.split("\n")
    heads = [
        n for n, line in enumerate(lines) if line[:1].strip() and not re.match(r"[)\]}]|(?:el|except|finally)", line)
    ]
    kept, number, attempts = [], 0, 0
    while number < len(heads):
        ends = [*heads[number + 1 : number + 1 + _JOINED], len(lines)]
        for joined, end in enumerate(ends, 1):
            part = "\n".join(lines[heads[number] : end])
            if parse(part):
                kept.append(part)
                break
            attempts += 1
            if attempts > _ATTEMPTS + len(heads) or not _goes_on(part):
                joined = 0
                break
        else:
            joined = 0
        if not joined and strict and _CODE.match(lines[heads[number]]):
            return ""
        number += max(joined, 1)
    return "\n".join(kept)


def _goes_on(part: str) -> bool:
    """Whether a part that does not parse may be the beginning of a statement."""
    if part.startswith("@"):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(part)
    except SyntaxError as error:
        return "never closed" in error.msg or "triple-quoted" in error.msg
    except (ValueError, RecursionError, MemoryError):
        pass
    return False


def _best(sources: Iterable[Source], wanted: Collection[str]) -> Source | None:
    scored = [(sum(defines(source.statements, name) for name in wanted), source) for source in sources]
    scored = [(score, source) for score, source in scored if score]
    return max(scored, key=lambda item: (item[0], item[1].place, len(item[1].text)))[1] if scored else None


def _helpers(answer: str, found: Source, lacking: set[str], wanted: Collection[str]) -> list[str]:
    """Returns definitions of the `lacking` names in other stretches, the last of each, in the order to execute them."""
    helpers: list[str] = []
    others = [_read(text, place) for text, place in stretches(answer, 1)]
    others = [source for source in others if source and source.text.strip() not in found.text]
    nodes = [(node, source.text) for source in reversed(others) for node in reversed(source.statements)]
    usable = [
        (node, text, bound([node]))
        for node, text in nodes
        if isinstance(node, _DEFINITIONS)
        or (isinstance(node, (ast.Assign, ast.AnnAssign)) and not _loads([node]) & set(wanted))
    ]
    known = bound(found.statements)
    while chosen := next(((node, text, names) for node, text, names in usable if names & lacking - known), None):
        node, text, names = chosen
        helpers.insert(0, "\n".join(_lines(text, node)))
        lacking, known = lacking | free_names([node]), known | names
    return helpers


def _without_examples(source: Source, wanted: Collection[str]) -> str:
    """Returns the source without top-level statements that only show how it is used: bare expressions, and what prints,
    reads input, ends the program or calls a wanted name, unless it defines or shares a name that functions read."""
    functions = [s for s in source.statements if isinstance(s, (*_FUNCTIONS, ast.ClassDef))]
    examples = [node for node in source.statements if _is_example(node, wanted)]
    rest = [node for node in source.statements if node not in examples]
    shared = _loads(functions) & bound([*rest, *examples]) - bound(functions)
    lines = source.text.split("\n")
    for node in examples:
        first, last = node.lineno, node.end_lineno or node.lineno
        alone = not any(s is not node and s.lineno <= last and (s.end_lineno or 0) >= first for s in source.statements)
        if alone and not (bound([node]) | _loads([node])) & shared:
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(lines)


def _is_example(node: ast.stmt, wanted: Collection[str]) -> bool:
    if isinstance(node, _DEFINITIONS):
        return False
    if bound([node]) & set(wanted):
        return False
    calls = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    if isinstance(node, ast.Expr) and not calls:
        return not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.AnnAssign) and node.value is None:
        return True
    names = {func.id for func in calls if isinstance(func, ast.Name)}
    ends = {(f.value.id, f.attr) for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)}
    return bool(names & {"print", "input", "exit", "quit", *wanted} or ends & _ENDS)


def _is_stub(node: ast.stmt) -> bool:
    """Whether a statement is a docstring, `pass`, `...` or `raise NotImplementedError`."""
    if isinstance(node, ast.Raise):
        return bool(node.exc) and "NotImplementedError" in _loads([node])
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _loads(statements: Iterable[ast.AST]) -> set[str]:
    nodes = (node for statement in statements for node in ast.walk(statement))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _lines(text: str, node: ast.stmt) -> list[str]:
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return text.split("\n")[first - 1 : node.end_lineno]


def _blocks(answer: str) -> Iterator[tuple[re.Match[str], str, bool]]:
    """Yields (first fence, text, whether it is closed) of fenced blocks; an unclosed one extends to the end."""
    opened = None
    for match in _FENCE.finditer(answer):
        if opened is None:
            opened = match
        elif match[1].startswith(opened[1]) and not match[2]:
            yield opened, answer[opened.end() + 1 : match.start()], True
            opened = None
    if opened is not None:
        yield opened, answer[opened.end() + 1 :], False


def _last_block(answer: str) -> str:
    """Returns the last fenced Python block, else the last fenced block, else all."""
    blocks = [(fence[2].lower(), text) for fence, text, _ in _blocks(answer)]
    python = [text for language, text in blocks if language in ("python", "python3", "py")]
    return (python or [text for _, text in blocks] or [answer])[-1]
