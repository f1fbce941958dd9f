"""Data rows of the code reward: their checks, and from a row and an answer to a program with its tests.

HumanEval's form has `prompt`, `test` and `entry_point`; MBPP's has `test_list` and optionally `test_imports`,
`test_setup_code`, `challenge_test_list` and, in MBPP+, `test`.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import dropwhile, takewhile
from typing import Any

from lsp_jax.core.errors import InputError
from lsp_jax.reward.base import DataRows
from lsp_jax.reward.code_blocks import bound, defining_code, extract_code, free_names, parse, stretches

MAX_PROGRAM = 100_000  # characters; a longer program scores 0
PACKAGES = ("numpy",)  # in the sandbox beside the standard library, for the tests of HumanEval+ and MBPP+
_FUTURE = re.compile(r"^from __future__ import [^\n]*$", re.MULTILINE)


def program_and_tests(row: Mapping[str, Any], answer: str) -> tuple[str, list[str]]:
    """Returns the program of an answer and its tests. `row` has passed `check_rows`.

    A HumanEval answer that defines the function is appended to the prompt, whose imports and helpers it may use; any
    other answer continues the prompt's function. MBPP's imports and set-up run before the program, its imports also
    before the tests.
    """
    if "entry_point" in row:
        program = _completed(row["prompt"], row["entry_point"], answer)
        return _futures_first(program), [f"{row['test']}\n\ncheck({row['entry_point']})\n"]
    imports, extra = list(row.get("test_imports") or ()), row.get("test")
    tests = [*row["test_list"], *(row.get("challenge_test_list") or ()), *([extra] if extra else ())]
    before = "\n".join(filter(None, [*imports, row.get("test_setup_code")]))
    wanted, ready = _wanted(tuple(tests), before)
    code = extract_code(answer, wanted, ready)
    program = f"{before}\n{code}" if before else code
    return _futures_first(program), ["\n".join(imports), *tests] if imports else tests


@lru_cache(4096)
def _wanted(tests: tuple[str, ...], before: str) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the names that tests expect of the program, and those that the code `before` it defines."""
    ready = bound(parse(before) or ())
    statements = [node for test in tests for node in parse(test) or ()]
    return frozenset(free_names(statements) - ready), frozenset(ready)


def _completed(prompt: str, name: str, answer: str) -> str:
    """Returns HumanEval's prompt with the function from `answer`, or the answer alone if the prompt is not code."""
    start = _parsable(prompt)
    given = bound(parse(start) or ())
    code = defining_code(answer, [name], given - {name})
    if code:
        return f"{start}\n\n{code}" if start else code
    if name in given:
        begun = _statements_of(prompt, name)
        for rest in _continuations([answer, *(text for text, _ in stretches(answer, 1))], _indentation(start)):
            program = prompt + rest if rest.startswith("\n") or prompt.endswith("\n") else f"{prompt}\n{rest}"
            if _statements_of(program, name) > begun:
                return program
    return prompt + extract_code(answer)


def _statements_of(program: str, name: str) -> int:
    """Returns how many statements the function `name` has; 0 if the program cannot be parsed."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in parse(program) or () if isinstance(node, functions) and node.name == name]
    return len(found[-1].body) if found else 0


def _parsable(prompt: str) -> str:
    """Returns the prompt with a body if its last function has none; "" if it is not Python."""
    last = prompt.rstrip().rpartition("\n")[2]
    indent = last[: len(last) - len(last.lstrip())] + "    "
    return next((text for text in (prompt, f"{prompt.rstrip()}\n{indent}pass\n") if parse(text)), "")


def _indentation(program: str) -> str:
    """Returns the indentation of the last statement's body."""
    body = getattr((parse(program) or [ast.Pass()])[-1], "body", None)
    return " " * body[0].col_offset if isinstance(body, list) and body else "    "


def _continuations(texts: Iterable[str], indent: str) -> Iterator[str]:
    """Yields readings of each text as the rest of a function's body: whole ones, then without what follows the body,
    then without what precedes it."""
    texts = [text.replace("\r\n", "\n") for text in texts if text.strip() and len(text) <= MAX_PROGRAM]
    readings = [
        reading
        for text in texts
        for reading in (text, textwrap.indent(textwrap.dedent(text.strip("\n")), indent), indent + text.lstrip())
    ]
    yield from readings
    for reading in readings:
        first, *rest = reading.lstrip("\n").split("\n")
        yield "\n".join([first, *takewhile(_inside, rest)]) + "\n"
    for text in texts:
        after = list(dropwhile(lambda line: not line.strip() or not _inside(line), text.split("\n")))
        yield "\n".join(takewhile(_inside, after)) + "\n"


def _inside(line: str) -> bool:
    """Whether a line belongs to a body that is indented."""
    return not line.strip() or line[0] in " \t"


def _futures_first(program: str) -> str:
    """Moves `from __future__` imports to the top, where Python wants them."""
    futures = _FUTURE.findall(program)
    return "\n".join([*dict.fromkeys(futures), _FUTURE.sub("", program)]) if futures else program


def check_rows(rows: DataRows, places: Sequence[str] = ()) -> None:
    """Raises InputError for a row without tests in a known form, or whose tests import what the sandbox does not have.

    `places` says where each row is from, by default its index.
    """
    if not rows:
        raise InputError("code reward rows", None, "needs a data set with tests; self-play has none")
    for number, row in enumerate(rows):
        wrong = _wrong_field(row)
        if wrong:
            place = f"{places[number]}: " if places else f"code reward rows[{number}]."
            raise InputError(place + wrong[0], row.get(wrong[0]), wrong[1])


def _wrong_field(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the first field of a row that cannot be used, and what would be valid."""
    if "entry_point" in row:
        for key in ("prompt", "test", "entry_point"):
            if not _text(row.get(key)) or (key == "entry_point" and not row[key].isidentifier()):
                return key, "must be a string (HumanEval's form)"
        problem, of_test = _unusable(_parsable(row["prompt"])), _unusable(row["test"], defined="check")
        return ("prompt", problem) if problem else ("test", of_test) if of_test else None
    if not row.get("test_list") or not _texts(row["test_list"]):
        other = "there must be prompt, test and entry_point (HumanEval's)"
        return "test_list", f"must be a list of tests (MBPP's form), or {other}"
    for key in ("test_imports", "challenge_test_list"):
        if row.get(key) and not _texts(row[key]):
            return key, "must be a list of strings"
    for key in ("test_setup_code", "test"):
        if not isinstance(row.get(key) or "", str):
            return key, "must be a string"
    for key in ("test_imports", "test_setup_code", "test_list", "challenge_test_list", "test"):
        for code in [row[key]] if isinstance(row.get(key), str) else row.get(key) or ():
            if problem := _unusable(code):
                return key, problem
    return None


@lru_cache(4096)  # rows are checked again when they are scored
def _unusable(code: str, defined: str = "") -> str:
    """Returns why code of a data row, which must define the name `defined`, cannot run in the sandbox; "" if it can."""
    statements = parse(code)
    if statements is None:
        return "is not Python"
    if defined and defined not in bound(statements):
        return f"must define {defined}, as HumanEval's tests do"
    missing = sorted(_imported(statements) - sys.stdlib_module_names - {*PACKAGES})
    return f"imports {', '.join(missing)}, which the sandbox does not have; remove such rows" if missing else ""


def _imported(statements: Iterable[ast.AST]) -> set[str]:
    """Returns the modules that statements import, without those that they can do without."""
    names: set[str] = set()
    stack = list(statements)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif not isinstance(node, ast.Try):
            stack.extend(ast.iter_child_nodes(node))
    return names


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_text, value))
